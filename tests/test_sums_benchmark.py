"""benchmarks/sums.py at its smallest: its inputs, its records, its page."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import coherent

from .kernels.conftest import hardware_rounding  # noqa: F401, a fixture

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
FLOAT64 = 1e-12
"""Relative difference of float64 results whose sums have another order."""


@pytest.fixture(scope="module")
def sums():
    pytest.importorskip("triton.tools.tensor_descriptor", reason="needs Triton 3.4 or later")
    sys.path.insert(0, str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module("sums")
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


class TestInputs:
    @pytest.mark.parametrize("form", coherent.FORMS)
    @pytest.mark.parametrize("softcap", [None, 3.0])
    def test_exact_attention_by_blocks_of_rows(self, form, softcap, monkeypatch):
        monkeypatch.setattr(coherent, "BLOCK_ENTRIES", 4 * 100 * 37)
        q, k, v, grad = (x.detach().double() for x in coherent.draw("+mean", 100, 16, 4, 2))
        bounds = coherent.spans(100, "cpu", **coherent.masked(form, 100))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        logits = q @ k.repeat_interleave(2, 1).mT / 4
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        position = torch.arange(100)
        visible = (position >= bounds[..., :1]) & (position < bounds[..., 1:])
        p = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        out = torch.where(visible.any(-1)[:, None, :, None], p, 0.0) @ v.repeat_interleave(2, 1)
        expected = [out, *(x.nan_to_num() for x in torch.autograd.grad(out, leaves, grad))]
        found = coherent.exact(q, k, v, grad, bounds, softcap=softcap)
        assert all(coherent.relative(x, y.detach()) < FLOAT64 for x, y in zip(found, expected, strict=True))

    def test_exact_attention_with_dropout(self):
        q, k, v, grad = (x.detach().double() for x in coherent.draw("+mean", 40, 16))
        kept = torch.rand(1, 2, 40, 40, generator=torch.Generator().manual_seed(0)) < 0.75
        bounds = coherent.spans(40, "cpu")
        leaves = [x.requires_grad_() for x in (q, k, v)]
        hidden = torch.ones(40, 40).triu(1).bool()
        p = (q @ k.mT / 4).masked_fill(hidden, -torch.inf).softmax(-1) * kept / 0.75
        expected = [p @ v, *torch.autograd.grad(p @ v, leaves, grad)]
        found = coherent.exact(q, k, v, grad, bounds, keep=lambda rows, keys: kept[:, :, rows, keys], survival=0.75)
        assert all(coherent.relative(x, y.detach()) < FLOAT64 for x, y in zip(found, expected, strict=True))

    def test_forms(self):
        spans = {form: coherent.spans(64, "cpu", **coherent.masked(form, 64))[0] for form in coherent.FORMS}
        rows = torch.arange(64)
        assert torch.equal(spans["causal"], torch.stack([rows * 0, rows + 1], -1))
        assert torch.equal(spans["window"][:, 0], (rows - 15).clamp_min(0))
        starts, counts = spans["packed"][:, 0].unique(return_counts=True)
        assert starts.tolist() == [0, 32, 48, 56, 60]
        assert counts.tolist() == [32, 16, 8, 4, 4]
        assert (spans["padded"][:, 0] >= spans["padded"][:, 1])[:8].all()
        assert torch.equal(spans["padded"][8:], torch.stack([rows * 0 + 8, rows + 1], -1)[8:])

    def test_rows_attend_nearly_evenly_over_values_with_a_mean(self):
        q, k, v, grad = coherent.draw("+mean", 512, 64)
        p = (q[0, 0].detach().float() @ k[0, 0].detach().float().T / 8).softmax(-1)
        assert float(p.max()) < 2 / 512
        assert all(float(x.detach().float().mean()) == pytest.approx(1, abs=0.02) for x in (v, grad))


OPTIONS = ["--cases", "uniform", "+mean", "--dims", "64", "--lengths", "64"]


@pytest.mark.usefixtures("hardware_rounding")
class TestRun:
    def test_records_are_appended_once(self, sums, tmp_path, monkeypatch, capsys):
        path = tmp_path / "sums.jsonl"
        options = [*OPTIONS, "--forms", "causal", "packed", "--output", str(path)]
        monkeypatch.setenv("GEOSCALE_COMMIT", "one")
        sums.main(options)
        records = [json.loads(line) for line in path.read_text().splitlines()]
        names = {form: {r["implementation"] for r in records if r["form"] == form} for form in ("causal", "packed")}
        assert names["packed"] == {"hf_geoscale FP8", "specification"}
        assert names["causal"] >= {*names["packed"], "hf_geoscale FP8, high", "hf_geoscale FP8, portable"}
        assert "cuDNN FP8 is left out: ImportError" in capsys.readouterr().out
        assert all(0 < r["O"] < 0.05 and 0 < r["dK"] < 1 and r["environment"]["commit"] == "one" for r in records)
        sums.main(options)
        assert len(path.read_text().splitlines()) == len(records)
        monkeypatch.setenv("GEOSCALE_COMMIT", "another")
        sums.main([*options, "--implementations", "specification"])
        assert len(path.read_text().splitlines()) == len(records) + 4

    def test_the_portable_kernels_are_asked_for_and_given_back(self, sums):
        from hf_geoscale.kernels import passes

        before = passes.hopper.launches_for
        with sums.portable_kernels():
            assert passes.hopper.launches_for(None, None, counters=False) is None
        assert passes.hopper.launches_for is before

    def test_ours_may_not_be_left_out(self, sums, monkeypatch):
        def fails(problem):
            raise RuntimeError("no such kernel")

        monkeypatch.setitem(sums.IMPLEMENTATIONS, "hf_geoscale FP8", fails)
        with pytest.raises(RuntimeError, match="no such kernel"):
            sums.main([*OPTIONS, "--forms", "causal"])


def record(name: str, length: int, label: str = "now", **changed) -> dict:
    made = {
        **{"label": label, "case": "+mean", "form": "causal", "dim": 128, "length": length, "implementation": name},
        **{"seed": 0, "heads": [2, 1], "O": 0.002, "last": 0.0021, "dQ": 0.2, "dK": 0.1, "dV": 0.0023},
    }
    return made | {"environment": {"gpu": "one H200", "commit": label}} | changed


class TestPage:
    def test_figures_come_from_the_last_records(self, sums, tmp_path):
        page = tmp_path / "sums.md"
        page.write_text("# Sums\n\n<!-- generated: records -->\nold\n<!-- /generated -->\nby hand\n")
        with pytest.raises(ValueError, match="'bound'"):
            importlib.import_module("sums_report").write([record("specification", 1024)], page)
        page.write_text(page.read_text() + "<!-- generated: bound -->\n<!-- /generated -->\nend\n")
        records = [
            record("hf_geoscale FP8", 1024, O=0.9),
            record("hf_geoscale FP8", 1024, dQ=0.23),
            record("hf_geoscale FP8", 32768, O=0.0044),
            record("hf_geoscale FP8", 32768, "before", dQ=5.2, dK=5.4),
            record("FlashAttention-3 FP8", 32768, dQ=None, dK=None, dV=None),
            *(record("specification", length) for length in (1024, 32768)),
            *(record(name, 4096, form="packed", dQ=0.25) for name in ("hf_geoscale FP8", "specification")),
        ]
        path = tmp_path / "sums.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        sums.main(["--report", str(path)])
        text = page.read_text()
        assert "old" not in text
        assert "by hand" in text
        assert text.endswith("end\n")
        assert "| hf_geoscale FP8 | +mean | 3 | .004 | .002 | .002 | 2.20 | 1.15 | 1.00 | 1.00 |" in text
        assert "| +mean 32,768 | .20 .10 .002 | 5.2 5.4 .002 | .20 .10 .002 | – – – |" in text
        assert "| packed documents | +mean | 128 | 4,096 | .002 / .002 | .002 / .002 | .25 / .25 |" in text
        assert '- records "before": gpu one H200, commit before.' in text
        assert path.with_suffix(".png").stat().st_size > 1000

    def test_the_published_page_is_that_of_its_records(self, sums):
        report = importlib.import_module("sums_report")
        page = (ROOT / "docs" / "sums.md").read_text()
        assert report.replaced(page, "bound", report.bound_part()) == page
        path = ROOT / "docs" / "sums.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        assert report.replaced(page, "records", report.records_part(found)) == page

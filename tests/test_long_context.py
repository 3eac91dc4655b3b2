"""benchmarks/long_context.py on a tiny model: what it measures, and its part of the page."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from .conftest import tiny_model, tokens

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmark_module():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module("long_context")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.fixture
def records(benchmark_module, monkeypatch) -> dict[str, dict]:
    monkeypatch.setattr(benchmark_module, "BIN", 16)
    names = [benchmark_module.BF16, *benchmark_module.VARIANTS]
    found = list(benchmark_module.measure(tiny_model("llama"), tokens(2, 48), names))
    return {record["variant"]: record for record in found}


def test_variants_differ_from_float32_as_they_should(benchmark_module, records):
    bf16, standard, high = (records[n] for n in (benchmark_module.BF16, *benchmark_module.VARIANTS))
    assert all(len(r["kl"]) == 3 and min(r["kl"]) > 0 for r in records.values())
    assert 0 < bf16["gradient"]["all"] < high["gradient"]["all"] < standard["gradient"]["all"] < 0.3
    assert set(standard["gradient"]) == {"all", *benchmark_module.KINDS}
    assert {r["overflows"] for r in records.values()} == {0}


def test_a_model_equals_itself(benchmark_module):
    model, ids = tiny_model("llama"), tokens(2, 48)
    runs = [benchmark_module.Run(model, ids) for _ in range(2)]
    first, second = map(list, runs)
    assert all(float(benchmark_module.kl(x, y).abs().max()) == 0 for x, y in zip(first, second, strict=True))
    assert benchmark_module.gradient_errors(*(run.gradients for run in runs))["all"] == 0
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    mean = torch.stack([benchmark_module.losses(x, row) for x, row in zip(first, ids, strict=True)]).mean()
    torch.testing.assert_close(mean, loss)
    loss.backward()
    torch.testing.assert_close(runs[0].gradients["lm_head.weight"], model.lm_head.weight.grad)


def test_errors_by_kind(benchmark_module):
    truth = {"model.layers.0.self_attn.q_proj.weight": torch.ones(4), "model.norm.weight": 3 * torch.ones(4)}
    ours = {name: x.clone() for name, x in truth.items()}
    ours["model.norm.weight"] += 0.3
    found = benchmark_module.gradient_errors(ours, truth)
    assert found["q_proj"] == 0
    assert found["norm"] == pytest.approx(0.1)
    assert found["all"] == pytest.approx(0.3 / 10**0.5)
    with pytest.raises(ValueError, match=r"model\.head\.weight"):
        benchmark_module.kind_of("model.head.weight")


def test_the_part_of_the_page(benchmark_module, records, tmp_path):
    shared = {"label": "now", "model": "tiny", "environment": {"gpu": "CPU", "commit": "x"}}
    lines = [record | shared for record in records.values()]
    lines.append(lines[-1] | {"label": "before", "kl": [9.0, 9.0, 9.0]})
    path = tmp_path / "long_context.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = tmp_path / "sums.md"
    page.write_text("a\n<!-- generated: long context -->\n<!-- /generated -->\nb\n")
    benchmark_module.main(["--report", str(path)])
    text = page.read_text()
    assert text.startswith("a\n")
    assert text.endswith("b\n")
    assert "tiny, 2 sequences of 48 tokens" in text
    assert "| model | to 16 | to 32 | to 48 | loss | overflows |" in text
    assert '| precision="high", before | 9.0000 | 9.0000 | 9.0000 |' in text
    with pytest.raises(ValueError, match="several models or lengths"):
        benchmark_module.page_part([*lines, lines[0] | {"length": 64, "variant": "another"}])


def test_the_published_page_is_that_of_its_records(benchmark_module):
    path = ROOT / "docs" / "long_context.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    page = (ROOT / "docs" / "sums.md").read_text()
    assert benchmark_module.replaced(page, "long context", benchmark_module.page_part(found)) == page

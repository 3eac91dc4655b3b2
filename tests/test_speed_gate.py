"""The gate of benchmarks/attention_speed.py: what passes it, and what does not."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hf_geoscale import fp8_attention

from .kernels.conftest import hardware_rounding  # noqa: F401, a fixture

pytestmark = pytest.mark.cpu
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def gate():
    sys.path.insert(0, str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module("speed_gate")
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def problem(gate):
    return gate.Gate(sys.modules["rivals"].Shape(1, 131, 4, 2, 64, 50), "cpu")


class Candidate:
    """FP8 attention by the reference backend, or exact attention in float32, with something changed."""

    def __init__(self, attend):
        self.attend = attend

    def __call__(self, q, k, v, grad, shape):
        self.leaves, self.grad = (q, k, v), grad
        return self

    def result(self):
        out = self.attend(*self.leaves)
        return [out, *torch.autograd.grad(out, self.leaves, self.grad.to(out.dtype))]


def fp8(gate, window: int | None = 50, factor: float = 1.0, **options):
    def attend(q, k, v):
        scales = {f"{n}_quant_scale": factor * gate.quant_scale(x) for n, x in (("q", q), ("k", k), ("v", v))}
        return fp8_attention(q, k, v, **scales, window=window, backend="reference", **options)

    return Candidate(attend)


def bfloat16(q, k, v):
    rows = torch.arange(q.shape[2])
    visible = (rows[:, None] >= rows) & (rows[:, None] - rows < 50)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)


def test_what_is_right_passes(gate, problem):
    for name, make in {
        "ours FP8": fp8(gate),
        "ours FP8, high": fp8(gate, precision="high"),
        "theirs BF16": Candidate(bfloat16),
    }.items():
        reason, errors = problem.check(name, make)
        assert reason is None
        assert list(errors) == ["O", "dQ", "dK", "dV"]


def test_what_is_wrong_does_not(gate, problem):
    def wrong(name: str, make) -> str:
        reason, _ = problem.check(name, make)
        assert reason.startswith("wrong: ")
        return reason

    assert "O has relative error" in wrong("FP8", fp8(gate, window=48))
    assert "O has relative error" in wrong("BF16", fp8(gate))  # FP8 is not BF16
    assert "O has relative error" in wrong("FP8", fp8(gate, factor=2.0**-12))  # underflows
    assert "O has relative error nan at 131 tokens, allowed" in wrong(
        "FP8", Candidate(lambda q, k, v: bfloat16(q, k, v) / 0 * 0)
    )

    def scaled_gradient(q, k, v):
        return bfloat16(q * 1.3 - 0.3 * q.detach(), k, v)

    found = re.search(r"dQ has relative error (\S+)", wrong("FP8", Candidate(scaled_gradient)))
    assert float(found[1]) == pytest.approx(0.3, rel=2.0**-8)  # BF16's rounding


def test_e5m2_gradients_may_be_twice_as_far_off(gate, problem):
    ours, theirs = problem.allowed("hf_geoscale FP8"), problem.allowed("Transformer Engine FP8")
    assert theirs == {"O": ours["O"]} | {name: 2 * ours[name] for name in ("dQ", "dK", "dV")}


def test_what_cannot_run_is_said(gate, problem):
    def attend(q, k, v):
        raise NotImplementedError("no window\nand more")

    assert problem.check("FP8", Candidate(attend)) == ("NotImplementedError: no window", {})


def test_an_odd_length_drops_what_is_wrong_and_keeps_what_does_not_run(gate, monkeypatch, capsys):
    monkeypatch.setattr(gate, "GATE_LENGTH", 64)
    monkeypatch.setattr(gate, "ODD_LENGTHS", (67,))
    monkeypatch.setattr(gate, "COHERENT_LENGTHS", ())
    shape = sys.modules["rivals"].Shape(1, 0, 4, 2, 64)

    def causal(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def refuses(q, k, v):
        if q.shape[2] % 8:
            raise RuntimeError("odd")
        return causal(q, k, v)

    def garbles(q, k, v):
        return causal(q, k, v) * (1 + q.shape[2] % 8)

    contenders = {name: Candidate(x) for name, x in (("a BF16", causal), ("b BF16", refuses), ("c BF16", garbles))}
    found, reasons, faults = gate.correct(shape, contenders, "cpu")
    assert faults == {}
    assert list(found) == ["a BF16", "b BF16"]
    assert list(reasons) == ["c BF16"]
    assert "at 67 tokens" in reasons["c BF16"]
    assert "b BF16, 67 tokens: RuntimeError: odd" in capsys.readouterr().out


def test_sums_that_are_too_short_drop_ours_and_are_said_of_others(gate, monkeypatch):
    monkeypatch.setattr(gate, "GATE_LENGTH", 64)
    monkeypatch.setattr(gate, "ODD_LENGTHS", (67,))
    monkeypatch.setattr(gate, "COHERENT_LENGTHS", (256,))
    shape = sys.modules["rivals"].Shape(1, 0, 2, 1, 64)

    def short_sums(q, k, v):
        """A twentieth of sums of more than 100 terms is lost, as far as they have one sign."""
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        rows = torch.arange(q.shape[2])[:, None]
        return torch.where((rows > 100) & (out.mean(-1, keepdim=True).abs() > 0.5), 0.95 * out, out)

    right = fp8(gate, window=None)
    contenders = {
        "hf_geoscale FP8": right,
        "hf_geoscale FP8, b": Candidate(short_sums),
        "their FP8": Candidate(short_sums),
    }
    contenders["their BF16"] = Candidate(short_sums)
    found, reasons, faults = gate.correct(shape, contenders, "cpu")
    assert list(found) == ["hf_geoscale FP8", "their FP8", "their BF16"]
    assert re.fullmatch(
        r'wrong: O has relative error \S+ at 256 tokens of "\+mean", allowed \S+', reasons["hf_geoscale FP8, b"]
    )
    assert faults == {"their FP8": reasons["hf_geoscale FP8, b"].removeprefix("wrong: ")}


@pytest.mark.usefixtures("hardware_rounding")
def test_the_benchmark_calls_the_ops_as_they_are(gate):
    pytest.importorskip("triton.tools.tensor_descriptor", reason="needs Triton 3.4 or later")
    speed = importlib.import_module("attention_speed")
    problem = gate.Gate(sys.modules["rivals"].Shape(1, 67, 1, 1, 64), "cpu")
    results = []
    for name in ("hf_geoscale FP8", "hf_geoscale FP8, autograd"):
        reason, errors = problem.check(name, speed.CONTENDERS[name])
        assert reason is None
        results.append(errors)
    assert results[0] == results[1]
    ours = speed.Ours(*problem.tensors, problem.shape)
    ours.forward()
    ours.backward()
    assert list(ours.kernels) == ["forward", "query_gradient", "key_gradient"]


def test_the_page_says_what_is_not_timed_and_how_many_plans_were_tried(gate, monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton.tools.tensor_descriptor", reason="needs Triton 3.4 or later")
    speed = importlib.import_module("attention_speed")
    row = {
        **{
            "model": "m",
            "batch": 1,
            "length": 64,
            "name": "cuDNN FP8",
            "forward_flops": 1e9,
            "gate_errors": {"O": 0.05},
        },
        "ms": {"whole forward": [1, 2, 3], "whole both": [4, 5, 6]},
        "plans_tried": {"forward": 2, "backward": 3},
    }
    rows = [
        row,
        row | {"length": 128, "plans_tried": {"forward": 1, "backward": 3}},
        row | {"name": "a", "plans_tried": {}},
    ]
    measured = []
    monkeypatch.setattr(speed, "MODELS", {"m": None, "n": None})

    def measure(model, lengths):
        measured.append(model)
        return [r | {"model": model} for r in rows], {"theirs": "ImportError: needs it"}, {"a": "O is far off"}

    monkeypatch.setattr(speed, "measure", measure)
    output = ["--output", str(tmp_path / "speed")]
    speed.main([*output, "--models", "m"])
    speed.main(output)
    assert measured == ["m", "n"]
    monkeypatch.setenv("GEOSCALE_COMMIT", "another")
    speed.main([*output, "--models", "m"])
    assert measured == ["m", "n", "m"]
    page = (tmp_path / "speed.md").read_text()
    assert "| 1 × 64 | cuDNN FP8 | – | – | 2.00 | 5.00 | – | .050 |" in page
    assert "cuDNN FP8: the fastest of its plans at each length, of forward 1–2, backward 3." in page
    assert "Not timed: theirs (ImportError: needs it)." in page
    assert "Timed, but wrong where sums grow (docs/sums.md): a (O is far off)." in page
    assert page.index("**n**") < page.index("**m**")
    assert "commit another." in page[page.index("**m**") :]
    assert "commit another." not in page[: page.index("**m**")]
    capsys.readouterr()
    speed.main(["--render", str(tmp_path / "speed.jsonl")])
    assert capsys.readouterr().out.strip() == page.strip()


def test_the_published_page_is_rendered_from_its_records(gate, capsys):
    pytest.importorskip("triton.tools.tensor_descriptor", reason="needs Triton 3.4 or later")
    docs = BENCHMARKS.parent / "docs"
    importlib.import_module("attention_speed").main(["--render", str(docs / "attention_speed.jsonl")])
    assert capsys.readouterr().out.strip() == (docs / "attention_speed.md").read_text().strip()


def test_published_errors(gate):
    errors = gate.published_errors("BF16 attention")
    assert list(errors) == ["O", "dQ", "dK", "dV"]
    assert all(0.001 < x < 0.02 for x in errors.values())

"""benchmarks/adapters.py at its smallest, on a tiny model."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .conftest import SHAPE

pytest.importorskip("peft")


@pytest.fixture
def benchmark():
    path = Path(__file__).parent.parent / "benchmarks" / "adapters.py"
    spec = importlib.util.spec_from_file_location("adapters_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Tokenizer:
    """Bytes of ASCII text as ids."""

    def __call__(self, text, return_tensors=None, verbose=True):
        ids = [ord(c) % 90 + 3 for c in text]
        return type("Encoding", (), {"input_ids": ids if return_tensors is None else torch.tensor([ids])})


def run(benchmark, monkeypatch, path: Path, method: str) -> str:
    config = LlamaConfig(**{**SHAPE, "intermediate_size": 128})  # 4-bit blocks are of 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    monkeypatch.setattr(benchmark, "load", lambda folder: (copy.deepcopy(model), Tokenizer()))
    monkeypatch.setattr(benchmark, "read_text", lambda path: "an adapter of low rank " * 40)
    options = ["--steps", "3", "--batch", "2", "--length", "32", "--held-out", "2", "--seeds", "0", "1"]
    benchmark.main(["tiny", "--methods", method, *options, "--learning-rate", "0.01", "--output", str(path)])
    return path.read_text()


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("LoRA", marks=pytest.mark.feature("LoRA")),
        pytest.param("QLoRA", marks=pytest.mark.feature("QLoRA (bitsandbytes 4-bit)")),
    ],
)
def test_the_table(benchmark, monkeypatch, tmp_path, method):
    if method == "QLoRA":
        pytest.importorskip("bitsandbytes")
    text = run(benchmark, monkeypatch, tmp_path / "adapters.md", method)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {method}")]
    assert [row[1:3] for row in rows] == [[seed, kind] for seed in "01" for kind in ("BF16 (SDPA)", "FP8")]
    losses = [float(row[4]) for row in rows]
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.05 * losses[0]
    assert [row[-1] for row in rows] == ["–", "0", "–", "0"]
    assert f"- {method}: held-out gap FP8 − BF16" in text
    assert "over 2 seeds" in text


def test_the_summary_of_known_losses(benchmark):
    rows = [
        {"attention": kind, "held out": loss}
        for kind, loss in (("BF16 (SDPA)", 2.0), ("FP8", 2.1), ("BF16 (SDPA)", 3.0), ("FP8", 3.3))
    ]
    text = benchmark.summary("LoRA", rows)
    assert "gap FP8 − BF16 +0.2000 nats, standard deviation 0.1414 over 2 seeds; BF16 itself spreads by 0.7071" in text
    assert "one seed, no spread" in benchmark.summary("LoRA", rows[:2])

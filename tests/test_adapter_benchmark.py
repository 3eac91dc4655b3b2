"""benchmarks/adapters.py at its smallest, on a tiny model."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .conftest import SHAPE

pytest.importorskip("peft")


@pytest.fixture
def adapters(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
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


def run(adapters, monkeypatch, path: Path, method: str) -> str:
    config = LlamaConfig(**{**SHAPE, "intermediate_size": 128})  # 4-bit blocks are of 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    monkeypatch.setattr(adapters, "load", lambda folder: (copy.deepcopy(model), Tokenizer()))
    monkeypatch.setattr(adapters, "read_text", lambda path: "an adapter of low rank " * 40)
    options = ["--steps", "3", "--batch", "2", "--length", "32", "--held-out", "2", "--learning-rate", "0.01"]
    command = ["tiny", "--methods", method, *options, "--output", str(path)]
    adapters.main([*command, "--seeds", "1"])
    adapters.main([*command, "--seeds", "0", "1"])  # which does what is missing
    with pytest.raises(ValueError, match="rows with another batch; give another --output, or remove it"):
        adapters.main([*command, "--batch", "1"])
    return path.read_text()


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("LoRA", marks=pytest.mark.feature("LoRA")),
        pytest.param("QLoRA", marks=pytest.mark.feature("QLoRA (bitsandbytes 4-bit)")),
    ],
)
def test_the_table(adapters, monkeypatch, tmp_path, method):
    if method == "QLoRA":
        pytest.importorskip("bitsandbytes")
    text = run(adapters, monkeypatch, tmp_path / "adapters.md", method)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {method}")]
    assert [row[1:3] for row in rows] == [[seed, kind] for seed in "01" for kind in adapters.PRECISIONS]
    own, under_sdpa, under_fp8 = ([float(row[column]) for row in rows] for column in (4, 5, 6))
    assert own[0] == under_sdpa[0]
    exact = [json.loads(line) for line in (tmp_path / "adapters.jsonl").read_text().splitlines()]
    columns = [
        [row[name] for row in exact if row["seed"] == 0]
        for name in (adapters.OWN, adapters.UNDER_SDPA, adapters.UNDER_FP8)
    ]
    assert columns[2][1] == columns[0][1]
    assert len({loss for column in columns for loss in column}) == 7
    assert all(abs(loss - own[0]) < 0.05 * own[0] for loss in own + under_sdpa + under_fp8)
    assert [row[-1] for row in rows] == ["–", "0", "0"] * 2
    assert f"- {method}, FP8 − BF16: held-out gap" in text
    assert "over 2 paired seeds" in text


def test_the_summary_of_known_losses(adapters):
    known = (
        ("BF16 (SDPA)", 2.0, 2.0, 2.0),
        ("FP8", 2.1, 2.01, 2.1),
        ("BF16 (SDPA)", 3.0, 3.0, 3.1),
        ("FP8", 3.3, 3.0, 3.3),
    )
    names = ("attention", adapters.OWN, adapters.UNDER_SDPA, adapters.UNDER_FP8)
    rows = [dict(zip(names, values, strict=True)) for values in known]
    text = adapters.summary("LoRA", "FP8", rows)
    assert "gap +0.2000 ± 0.1414 nats; of what was trained, both under SDPA, +0.0050 ± 0.0071, " in text
    assert "both under FP8, +0.1500 ± 0.0707 (mean" in text
    assert "over 2 paired seeds; BF16 itself spreads by 0.7071" in text
    assert "one seed, no spread" in adapters.summary("LoRA", "FP8", rows[:2])


def test_the_page_is_rendered_from_its_rows(adapters):
    path = Path(__file__).parent.parent / "docs" / "adapters.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert adapters.to_markdown(rows) == path.with_suffix(".md").read_text()

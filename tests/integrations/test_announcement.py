"""The line that says which kernels a patched model runs on: what it says, when, to whom."""

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hf_geoscale import geometry_report, patch_model, unpatch_model
from hf_geoscale.integrations import announcement, geoscale_layers
from hf_geoscale.kernels import backend
from hf_geoscale.kernels.backend import HOPPER, NONE, PLAIN, PORTABLE, TRITON_INSTALLED

from ..conftest import tiny_model, tokens

needs_interpreter = pytest.mark.skipif(not backend.INTERPRETED, reason="runs Triton's kernels on the CPU")


@pytest.fixture
def lines(caplog):
    """What was said so far, with its level; reading forgets it."""
    caplog.set_level(logging.INFO)

    def read() -> list[tuple[str, str]]:
        said = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == announcement.logger.name]
        caplog.clear()
        return said

    return read


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def kernels_here(monkeypatch):
    """Make backend="auto" take Triton's kernels, as on a GPU; they run in the interpreter."""

    def take():
        monkeypatch.setattr(backend, "INTERPRETED", False)
        monkeypatch.setattr(backend, "triton_missing", lambda device: None)
        backend.fused_kernels.cache_clear()

    yield take
    backend.fused_kernels.cache_clear()


def kernels(model) -> list[str]:
    return [row["kernels"] for row in geometry_report(model).rows]


@pytest.mark.cpu
class TestLine:
    def test_plain_pytorch_that_auto_takes_is_a_warning(self, lines, no_accelerator, monkeypatch):
        monkeypatch.setattr(backend, "INTERPRETED", False)
        patch_model(tiny_model("llama"))
        ((level, line),) = lines()
        assert level == "WARNING"
        assert line == (
            "geoscale: 2 layers in FP8: plain PyTorch, a specification: slower than SDPA "
            f"({backend.triton_missing(torch.device('cpu'))})"
        )

    def test_plain_pytorch_that_was_asked_for_is_none(self, lines, no_accelerator):
        patch_model(tiny_model("llama"), backend="reference")
        assert lines() == [
            (
                "INFO",
                'geoscale: 2 layers in FP8: plain PyTorch, a specification: slower than SDPA (backend="reference")',
            )
        ]

    def test_once_a_patch(self, lines):
        model = patch_model(tiny_model("llama"))
        assert len(lines()) == 1
        patch_model(model)
        model(tokens(1, 20))
        model(tokens(1, 20))
        assert lines() == []
        patch_model(model, precision="high")
        assert len(lines()) == 1
        patch_model(unpatch_model(model))
        assert len(lines()) == 1

    @needs_interpreter
    def test_kernels(self, lines, no_accelerator, kernels_here):
        kernels_here()
        model = patch_model(tiny_model("llama"))
        ((level, line),) = lines()
        assert (level, line.partition(" (")[0]) == ("INFO", "geoscale: 2 layers in FP8: portable Triton kernels")
        assert kernels(model) == [PORTABLE] * 2  # what would run
        model(tokens(1, 20))
        assert lines() == []

    @pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
    def test_hopper_kernels_and_dropout(self, lines, no_accelerator, kernels_here, monkeypatch):
        from hf_geoscale.kernels import hopper

        kernels_here()
        monkeypatch.setattr(hopper, "launch", SimpleNamespace())
        monkeypatch.setattr(hopper, "runs", lambda *_: True)
        patch_model(tiny_model("llama"))
        assert lines() == [("INFO", "geoscale: 2 layers in FP8: Hopper kernels")]
        patch_model(tiny_model("gpt2"))  # in evaluation mode
        assert lines() == [("INFO", "geoscale: 2 layers in FP8: Hopper kernels")]
        patch_model(tiny_model("gpt2").train())
        line = "geoscale: 2 layers in FP8: portable Triton kernels (the Hopper kernels do not have dropout)"
        assert lines() == [("INFO", line)]

    def test_layers_that_differ_are_counted_apart(self, lines, no_accelerator, monkeypatch):
        model = patch_model(tiny_model("llama"))  # which its layers do not keep alive
        layers = geoscale_layers(model)
        lines()
        choices = iter([backend.KernelChoice(HOPPER, None), backend.KernelChoice(PORTABLE, "its head dimension")])
        monkeypatch.setattr(announcement, "planned", lambda layer: next(choices))
        announcement.announce(layers)
        assert lines() == [
            ("INFO", "geoscale: 2 layers in FP8: 1 × Hopper kernels; 1 × portable Triton kernels (its head dimension)")
        ]

    def test_kernels_that_cannot_run(self, lines, no_accelerator, monkeypatch):
        monkeypatch.setattr(backend, "INTERPRETED", False)
        model = patch_model(tiny_model("llama"), backend="triton")
        ((_, line),) = lines()
        assert line.startswith(
            'geoscale: 2 layers in FP8: none, every forward will raise (backend="triton" cannot run: '
        )
        assert kernels(model) == [NONE] * 2
        with pytest.raises(RuntimeError, match='backend="triton" cannot run'):
            model(tokens(1, 20))


@pytest.mark.cpu
class TestBeforeTheModelIsWhereItRuns:
    HERE = (
        "geoscale: 2 layers in FP8; the weights are on the cpu device now, where plain PyTorch would run: a specification, slower "
        "than SDPA. The first forward says what runs"
    )

    @pytest.fixture(autouse=True)
    def accelerator(self, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)

    def test_a_model_that_stays_on_the_cpu(self, lines):
        model = patch_model(tiny_model("llama"))
        assert lines() == [("INFO", self.HERE)]
        model(tokens(1, 20))
        model(tokens(1, 20))
        ((level, line),) = lines()
        assert level == "WARNING"
        assert line.startswith(
            "geoscale: FP8 attention runs on cpu from llama layer 0 on: plain PyTorch, a specification"
        )

    @needs_interpreter
    def test_a_model_that_moves(self, lines, kernels_here):
        model = patch_model(tiny_model("llama"))
        assert lines() == [("INFO", self.HERE)]
        kernels_here()
        model(tokens(1, 20))
        model(tokens(1, 20))
        ((level, line),) = lines()
        assert level == "INFO"
        assert line.startswith("geoscale: FP8 attention runs on cpu from llama layer 0 on: portable Triton kernels")
        assert kernels(model) == [PORTABLE] * 2

    def test_weights_that_are_still_to_come(self, lines):
        with torch.device("meta"):
            model = tiny_model("llama")
        patch_model(model)
        assert lines() == [
            (
                "INFO",
                "geoscale: 2 layers in FP8; the weights are on the meta device now. The first forward says what runs",
            )
        ]


@needs_interpreter
@pytest.mark.cpu
class TestWhatRan:
    def test_calls_are_counted_by_kernels(self, lines, no_accelerator, kernels_here):
        model = patch_model(tiny_model("llama"))
        model(tokens(1, 20))
        kernels_here()
        model(tokens(1, 20))
        model(tokens(1, 20))
        rows = geometry_report(model).rows
        assert [row["kernel_calls"] for row in rows] == [{PLAIN: 1, PORTABLE: 2}] * 2
        assert [row["kernels"] for row in rows] == [f"{PORTABLE}, {PLAIN}"] * 2
        assert f"headroom 1, {PORTABLE}, {PLAIN}, |q|" in repr(model)
        assert [level for level, _ in lines()] == ["WARNING", "INFO"]  # at patching, and when the kernels took over

    def test_layers_of_an_unsupported_model_run_none(self):
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=99
        )
        model = patch_model(BertModel(config), fallback="sdpa")
        assert kernels(model) == [NONE]


SCRIPT = """
import io, json, logging, os, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.accelerator.is_available = lambda: False
config = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
found, package = {}, logging.getLogger("hf_geoscale")

def said(prepare=lambda: None):
    sys.stderr, stderr = io.StringIO(), sys.stderr
    try:
        prepare()
        patch_model(LlamaForCausalLM(config))
        return sys.stderr.getvalue()
    finally:
        sys.stderr = stderr

from hf_geoscale import patch_model
found["unconfigured"] = said()
os.environ["LOCAL_RANK"] = "0"
found["first of its node"] = said()
os.environ["LOCAL_RANK"] = "1"
found["second of its node"] = said()
del os.environ["LOCAL_RANK"]
package.setLevel(logging.ERROR)
found["silenced"] = said()
package.setLevel(logging.INFO)
found["configured"] = said(lambda: logging.basicConfig(format="mine %(message)s"))
print(json.dumps(found))
"""


def test_who_gets_the_line():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    line = found["unconfigured"]
    assert line.startswith("geoscale: 1 layer in FP8: ")
    assert line.count("\n") == 1
    assert found == {
        "unconfigured": line,
        "first of its node": line,
        "second of its node": "",
        "silenced": "",
        "configured": f"mine {line}",
    }

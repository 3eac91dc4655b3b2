"""Shared options, tiny models and the real one."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

if not torch.cuda.is_available():  # before any kernel is imported: run them in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_geoscale.kernels import attention
from hf_geoscale.kernels.backend import INTERPRETED

from .feature_matrix import Recorder

if INTERPRETED:
    from .interpreter import leave_out_unread_overflows, patch_once_a_launch

    patch_once_a_launch()
    leave_out_unread_overflows()

VOCABULARY = 96
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SHAPE = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _yarn_llama() -> LlamaForCausalLM:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, rope_scaling=rope))


FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama-bias-yarn": _yarn_llama,
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=9)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE)),
    "gpt2-inverse-layer": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE, scale_attn_by_inverse_layer_idx=True)),
}


def tiny_model(family: str, seed: int = 0, spread: float = 0.08):
    """A small model whose weights, gains, shifts and biases are all away from their initial values, in eval mode.

    With this spread logits stay around 1, as the tolerances of accuracy assume.
    """
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def here() -> torch.device:
    """Where the running test builds its tensors: --device."""
    return torch.empty(0).device


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def pytest_addoption(parser):
    parser.addoption("--smollm2", help="folder of SmolLM2-135M-Instruct (make model)")
    parser.addoption("--device", default="cpu", help="cpu, or cuda to build every model and tensor there")
    parser.addoption("--features", type=Path, help="JSON lines to record the features that tests prove in")


def pytest_configure(config):
    path = config.getoption("--features")
    if path and not hasattr(config, "workerinput"):  # workers report to the process that started them
        config.pluginmanager.register(Recorder(path))


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif "cpu" in item.keywords and config.getoption("--device") != "cpu":
            item.add_marker(pytest.mark.skip(reason="is about the CPU"))
        if torch.cuda.is_available() and "gpu" not in item.keywords and config.getoption("--device") == "cpu":
            continue  # what ran on the CPU of a machine with a GPU proves nothing for the GPU
        for marker in item.iter_markers("feature"):
            item.user_properties.append(("feature", (marker.args[0], marker.kwargs.get("refused", False))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One worker runs all of tests/distributed, whose files share their processes."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            return str(Path(path).parent) if "tests/distributed/" in path else path

    return Scheduling(config, log)


class _OnDevice(TorchFunctionMode):
    """New tensors and modules go to the device; a CPU generator draws on the CPU, so that numbers are the same everywhere."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.constructors = torch.device(device), _device_constructors()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        on_cpu = generator is not None and generator.device.type == "cpu"
        if on_cpu and function.__name__.endswith("_") and not args[0].is_cpu:  # uniform_ and its like
            return args[0].copy_(function(args[0].cpu(), *args[1:], **kwargs))
        if function not in self.constructors or kwargs.get("device") is not None:
            return function(*args, **kwargs)
        if on_cpu:
            return function(*args, **kwargs).to(self.device)
        return function(*args, **kwargs | {"device": self.device})


@pytest.fixture(autouse=True)
def on_device(request):
    device = request.config.getoption("--device")
    places_itself = request.node.get_closest_marker("places_itself")
    with _OnDevice(device) if device != "cpu" and not places_itself else nullcontext():
        yield
    if AcceleratorState._shared_state and "tests/distributed/" not in request.node.nodeid:
        AcceleratorState._reset_state(reset_partial_state=True)  # older releases keep the first Trainer's precision


def _allocations() -> int:
    """Blocks of GPU memory this process has ever asked for."""
    return torch.cuda.memory_stats().get("allocation.all.allocated", 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """With --device cuda, a feature counts as proven on the GPU only if the test allocated there and no FP8 attention ran
    on the CPU. Tests marked gpu compare the two; those that start a process say themselves where it "ran on"."""
    if item.config.getoption("--device") == "cpu" or item.get_closest_marker("gpu"):
        return (yield)
    before, on_cpu, reference = _allocations(), [], attention._reference

    def watched(query, *rest):
        if query.is_cpu:
            on_cpu.append(query.shape)
        return reference(query, *rest)

    attention._reference = watched
    try:
        return (yield)
    finally:
        attention._reference = reference
        proven = dict(item.user_properties).get("ran on") == "cuda"
        if on_cpu or (_allocations() == before and not proven):
            reason = f"{len(on_cpu)} attention calls of its test ran on the CPU" if on_cpu else "its test used no GPU"
            item.user_properties.append(("not on the device", reason))


@pytest.fixture(scope="session")
def smollm2_path(request) -> Path:
    path = request.config.getoption("--smollm2")
    if path is None:
        pytest.skip("needs SmolLM2-135M: run `make test`, or pass --smollm2 FOLDER")
    return Path(path)


@pytest.fixture(scope="session")
def smollm2(smollm2_path, request):
    """(model in float32 and eval mode, English token ids (4, 1024)). Tests leave it unpatched."""
    from hf_geoscale.cli.loading import load, read_text, token_blocks

    model, tokenizer = load(str(smollm2_path))
    device = request.config.getoption("--device")
    return model.eval().to(device), token_blocks(tokenizer, read_text(None), 1024, 4).to(device)

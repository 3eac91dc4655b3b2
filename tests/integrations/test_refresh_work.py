"""How much a refresh of large layers on a GPU asks of the host: operations and launches, counted in Triton's interpreter."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import LlamaConfig, LlamaForCausalLM

from hf_geoscale import patch_model, refresh_scales
from hf_geoscale.geometry import batch
from hf_geoscale.geometry import layer as layer_geometry
from hf_geoscale.integrations import geoscale_layers

launcher = pytest.importorskip("hf_geoscale.kernels.launcher")
kernels = pytest.importorskip("hf_geoscale.kernels.spectral")

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not kernels.takes(16, torch.device("cpu")), reason="needs Triton's interpreter"),
]


class CountedOperations(TorchDispatchMode):
    """Counts dispatched operations, views too."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Kernels launched, in order; what the interpreter does in torch for them is not counted."""
    names: list[str] = []
    original = launcher.DirectKernel._launch

    def launch(self, *arguments, **options):
        names.append(self.kernel.__name__)
        with _disable_current_modes():
            original(self, *arguments, **options)

    monkeypatch.setattr(launcher.DirectKernel, "_launch", launch)
    for module in (batch, layer_geometry):
        monkeypatch.setattr(module, "arithmetic_of", lambda maps: "tensor cores")
    return names


def model_of(layers: int):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=8, intermediate_size=8, num_hidden_layers=layers, **shape)
    return patch_model(LlamaForCausalLM(config).bfloat16().train())


def refresh(model, launches: list[str]) -> int:
    launches.clear()
    with CountedOperations() as counted:
        refresh_scales(model)
    return counted.count


def test_a_steady_refresh_is_three_launches_and_a_few_operations(launches):
    counts = []
    for layers in (2, 6):
        model = model_of(layers)
        refresh_scales(model)
        counts.append(refresh(model, launches))
        assert launches == ["gram_kernel", "norm_bound_kernel", "power_iteration_kernel"]
    per_layer = (counts[1] - counts[0]) / 4
    assert per_layer <= 3  # a view of each weight
    assert counts[0] - 2 * per_layer <= 30


def test_the_scales_are_those_of_the_torch_path(launches, monkeypatch):
    model = model_of(2)
    refresh_scales(model)
    assert launches
    mine = [layer.scaling.scales for layer in geoscale_layers(model)]
    monkeypatch.setattr("hf_geoscale.integrations.refresh._matrix_kernels", lambda: None)
    launches.clear()
    refresh_scales(model)
    assert not launches
    for scales, layer in zip(mine, geoscale_layers(model), strict=True):
        for name in "qkv":
            torch.testing.assert_close(getattr(scales, name), getattr(layer.scaling.scales, name), rtol=1e-5, atol=0)

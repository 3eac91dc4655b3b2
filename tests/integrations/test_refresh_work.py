"""How much a refresh of large layers on a GPU asks of the host: operations and launches, counted in Triton's interpreter."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import LlamaConfig, LlamaForCausalLM

from hf_geoscale import patch_model, refresh_scales
from hf_geoscale.geometry import batch, steady
from hf_geoscale.geometry import layer as layer_geometry
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.families import AttentionSite

launcher = pytest.importorskip("hf_geoscale.kernels.launcher", reason="needs Triton 3.4 or later", exc_type=ImportError)
kernels = pytest.importorskip("hf_geoscale.kernels.spectral", reason="needs Triton 3.4 or later", exc_type=ImportError)

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
    for module in (batch, layer_geometry, steady):
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
    geoscale_layers(model)[0].group._steady = None
    refresh_scales(model)
    assert not launches
    for scales, layer in zip(mine, geoscale_layers(model), strict=True):
        for name in "qkv":
            torch.testing.assert_close(getattr(scales, name), getattr(layer.scaling.scales, name), rtol=1e-5, atol=0)


class NoKernels:
    """In the place of `kernels.spectral`: takes what it takes, and gives ones."""

    def takes(self, dim, device):
        return True

    def can_read(self, weight, factors):
        return kernels.can_read(weight, factors)

    def tables(self, rows, device):
        return len(rows)

    def is_current(self, tables):
        return True

    def grams(self, rows, out, part):
        out.fill_(1)

    def grams_of(self, tables, out, part):
        out.fill_(1)

    def norm_bounds(self, grams, coefficients, squarings):
        return grams.new_ones(len(grams), dtype=torch.float64)

    def power_iteration(self, gram_q, gram_k, vectors, rounds):
        return gram_q.new_ones(len(gram_q), dtype=torch.float64), torch.ones_like(vectors)


def read_layers(monkeypatch) -> list[int]:
    """Grows by a layer's number whenever its maps are read."""
    read: list[int] = []
    original = AttentionSite.projections
    monkeypatch.setattr(AttentionSite, "projections", lambda site: read.append(site.layer) or original(site))
    return read


def test_layers_too_many_for_one_chain_are_measured_in_parts_that_read_no_maps(launches, monkeypatch):
    model = model_of(5)
    monkeypatch.setattr(layer_geometry, "GRAM_ENTRIES", 2 * 4 * 16**2)  # two layers of two query and two other heads
    refresh_scales(model)
    before = [layer.geometry for layer in geoscale_layers(model)]
    with torch.no_grad():
        for index, layer in enumerate(geoscale_layers(model)):
            for p in layer.site.parameters():
                p.mul_(index + 2)
    readings = read_layers(monkeypatch)
    refresh(model, launches)
    assert not readings
    assert launches == ["gram_kernel", "norm_bound_kernel", "power_iteration_kernel"] * 3
    for index, (layer, geometry) in enumerate(zip(geoscale_layers(model), before, strict=True)):
        grown = (index + 2) ** 2  # weights and gains
        torch.testing.assert_close(layer.geometry.v_bound, grown * geometry.v_bound, rtol=0.02, atol=0)


def test_a_refresh_after_a_step_reads_no_maps(launches, monkeypatch):
    model = model_of(1)
    refresh_scales(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    readings, (layer,) = read_layers(monkeypatch), geoscale_layers(model)
    before = layer.geometry
    refresh_scales(model)
    assert not readings
    assert layer.weights_version == layer.site.version()
    steady, layer.geometry, layer.group._steady = layer.geometry, before, None
    refresh_scales(model)
    assert readings == [0]
    for name in ("q_bound", "k_bound", "v_bound", "logit_bound", "sigma_lower", "vectors"):
        assert torch.equal(getattr(steady, name), getattr(layer.geometry, name))
        assert not torch.equal(getattr(steady, name), getattr(before, name))


def test_another_stream_reads_once_and_uploads_its_own_tables(launches, monkeypatch):
    """Nothing orders the first stream's upload before a launch on the second."""
    from hf_geoscale.kernels import gram

    model = model_of(1)
    refresh_scales(model)
    readings = read_layers(monkeypatch)
    refresh_scales(model)
    assert not readings
    monkeypatch.setattr(gram, "stream_of", lambda device: 7)
    uploads = gram._table.cache_info().misses
    refresh_scales(model)
    assert readings == [0]
    assert gram._table.cache_info().misses == uploads + 1
    refresh_scales(model)
    assert readings == [0]
    assert gram._table.cache_info().misses == uploads + 1


def _with_bias(module: nn.Linear) -> None:
    module.bias = nn.Parameter(torch.ones(module.out_features, dtype=torch.bfloat16))


def _with_adapter(attention) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), attention)


SAME = {"nothing", "a value by torch", "evaluation"}
CHANGES = {
    "nothing": lambda model, attention: None,
    "new parameter": lambda model, attention: setattr(
        attention.q_proj, "weight", nn.Parameter(9 * attention.q_proj.weight.detach())
    ),
    "new data": lambda model, attention: setattr(attention.k_proj.weight, "data", 9 * attention.k_proj.weight.data),
    "transposed data": lambda model, attention: setattr(
        attention.q_proj.weight, "data", attention.q_proj.weight.data.T.as_strided((32, 32), (1, 32))
    ),
    "a value by torch": lambda model, attention: nn.init.ones_(attention.q_proj.weight),
    "another dtype": lambda model, attention: model.float(),
    "new module": lambda model, attention: setattr(attention, "v_proj", nn.Linear(32, 16, False).bfloat16()),
    "bias": lambda model, attention: _with_bias(attention.v_proj),
    "adapter": lambda model, attention: _with_adapter(attention),
    "module inside": lambda model, attention: attention.v_proj.add_module("inner", nn.Identity()),
    "rotary factor": lambda model, attention: setattr(model.model.rotary_emb, "attention_scaling", 3.0),
    "softmax scale": lambda model, attention: setattr(attention, "scaling", 3.0),
    "offset of a norm": lambda model, attention: setattr(model.model.layers[1].input_layernorm, "offset", 1.0),
    "evaluation": lambda model, attention: model.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_refresh_reads_again_what_changed(monkeypatch, change):
    for module in (batch, layer_geometry, steady):
        monkeypatch.setattr(module, "arithmetic_of", lambda maps: "tensor cores")
    instead = NoKernels()
    monkeypatch.setattr("hf_geoscale.integrations.refresh._matrix_kernels", lambda: instead)
    model = model_of(2)
    refresh_scales(model)
    readings = read_layers(monkeypatch)
    refresh_scales(model)
    assert not readings
    CHANGES[change](model, model.model.layers[1].self_attn)
    refresh_scales(model)
    assert readings == ([] if change in SAME else [0, 1])

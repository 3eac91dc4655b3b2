"""Changed weights are noticed: the next forward runs on new scales, never on old ones."""

import pytest
import torch
from torch import nn

from hf_geoscale import (
    geometry_report,
    patch_model,
    refresh_scales,
)
from hf_geoscale.geometry import layer as layer_geometry
from hf_geoscale.geometry import operand_bound
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.sharding import attribute, follow_shards, submodules
from hf_geoscale.integrations.versions import module_versions, plain_versions

from ..conftest import here, tiny_model, tokens
from ..kernels.fused_cases import DEVICE, NEEDS_KERNELS


def bounds(model) -> list[torch.Tensor]:
    return [layer.geometry.q_bound for layer in geoscale_layers(model)]


class TestStaleness:
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
    @pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
    def test_every_optimizer_kernel_is_noticed(self, optimizer, kernel):
        """Fused kernels do not count as writes for torch, and are the Trainer's default."""
        model, ids = patch_model(tiny_model("llama")), tokens(1, 20)
        steps = optimizer(model.parameters(), lr=1.0, **kernel)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            steps.step()
        model(ids)
        for layer in geoscale_layers(model):
            torch.testing.assert_close(
                layer.geometry.q_bound, operand_bound(layer.site.projections()[0]), rtol=1e-12, atol=0
            )
        assert sum(row["overflows"] for row in geometry_report(model).rows) == 0

    def test_weights_made_in_inference_mode(self):
        with torch.inference_mode():
            model, ids = tiny_model("llama"), tokens(1, 20)
            patch_model(model)(ids)
            model.model.layers[0].self_attn.q_proj.weight.mul_(9)
            model(ids)
            assert geometry_report(model).rows[0]["overflows"] == 0

    def test_the_report_is_of_one_moment(self):
        model, ids = patch_model(tiny_model("llama"), observe_logits=True), tokens(1, 20)
        model(ids)
        before = geometry_report(model).rows[0]
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(10)
        after = geometry_report(model).rows[0]
        assert max(after["q_bound"]) == pytest.approx(10 * max(before["q_bound"]))
        assert all(
            low <= high * (1 + 1e-9) for low, high in zip(after["sigma_lower"], after["sigma_upper"], strict=True)
        )
        assert after["alpha_observed"] is None  # a share of today's worst case, by logits of other weights
        assert after["q_amax"] == pytest.approx(before["q_amax"])
        assert after["utilisation"] == before["utilisation"]

    def change(self, model, how: str) -> None:
        weight = model.model.layers[0].self_attn.q_proj.weight
        if how == "optimizer":
            weight.grad = -torch.ones_like(weight)
            torch.optim.SGD([weight], lr=1.0).step()
        elif how == "load_state_dict":
            state = {n: v.clone() for n, v in model.state_dict().items()}
            state["model.layers.0.self_attn.q_proj.weight"] += 1
            model.load_state_dict(state)
        elif how == "new parameter":
            model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(weight.detach() + 1)
        elif how == "norm gain":
            with torch.no_grad():
                model.model.layers[0].input_layernorm.weight.add_(10)
        elif how == "dtype":
            model.to(torch.bfloat16)

    @pytest.mark.parametrize("how", ["optimizer", "load_state_dict", "new parameter", "norm gain"])
    def test_a_forward_after_a_change_uses_new_scales(self, how):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 20)
        model(ids)
        old = bounds(model)[0]
        self.change(model, how)
        model(ids)
        assert (bounds(model)[0] > 1.5 * old).all()
        assert geometry_report(model).rows[0]["overflows"] == 0

    def test_changing_dtype_refreshes(self):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 20)
        old = geoscale_layers(model)[0].weights_version
        self.change(model, "dtype")
        model(ids)
        assert geoscale_layers(model)[0].weights_version != old

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"quantize_logits": True},
            {"quantize_logits": True, "scaling": "delayed"},
            pytest.param({"backend": "triton", "observe_logits": True}, marks=NEEDS_KERNELS[0]),
        ],
        ids=["certified", "logits", "delayed", "fused"],
    )
    def test_scales_made_in_inference_mode_serve_training(self, options):
        device = DEVICE if "backend" in options else here()
        model, ids = patch_model(tiny_model("llama").to(device), **options), tokens(1, 20).to(device)
        self.change(model, "norm gain")
        with torch.inference_mode():
            mask = torch.ones(20, 20, device=device).tril().bool()[None, None]
            model(ids, attention_mask=mask)
            first = model(ids, attention_mask=mask).logits
            mask[..., 10:, :10] = False  # no version counter tells of this
            assert not torch.equal(model(ids, attention_mask=mask).logits, first)
        model(ids, labels=ids).loss.backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad.any()

    def test_an_unchanged_model_is_not_measured_again(self, monkeypatch):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 20)
        monkeypatch.setattr("hf_geoscale.integrations.refresh.measure_layers", None)
        model(ids)

    def test_writes_through_data_need_refresh_scales(self):
        model = patch_model(tiny_model("llama"))
        old = bounds(model)[0]
        model.model.layers[0].self_attn.q_proj.weight.data.mul_(5)
        refresh_scales(model)
        torch.testing.assert_close(bounds(model)[0], 5 * old)

    def test_refresh_needs_a_patched_model(self):
        with pytest.raises(ValueError, match="patch_model"):
            refresh_scales(tiny_model("llama"))
        with pytest.raises(ValueError, match="patch_model"):
            geometry_report(tiny_model("llama"))


def test_walks_find_what_modules_finds():
    """Each module once, in the same order, shared and missing ones included."""
    shared = torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(
        shared, torch.nn.Sequential(torch.nn.Linear(2, 2), shared), torch.nn.ModuleDict({"a": shared})
    )
    model.register_module("none", None)
    assert submodules([model]) == list(model.modules())
    assert submodules([shared, model]) == [shared, *(m for m in model.modules() if m is not shared)]
    assert attribute(model, "0") is shared
    assert attribute(shared, "in_features") == 2
    assert attribute(model, "missing") is None


def test_autocast_around_a_refresh_changes_no_certificate(monkeypatch):
    monkeypatch.setattr(layer_geometry, "arithmetic_of", lambda maps: "tensor cores")  # autocast leaves float64 alone
    model = patch_model(tiny_model("llama"))
    expected = bounds(model)
    with torch.autocast(here().type, dtype=torch.bfloat16):
        refresh_scales(model)
    assert all(torch.equal(old, new) for old, new in zip(expected, bounds(model), strict=True))


def test_weights_gathered_from_shards_have_the_version_of_their_shards():
    """Their address changes with each gathering; `sharding` says when they count as written."""
    linears = [nn.Linear(4, 4) for _ in range(2)]
    follow_shards(linears[:1])
    before = [module_versions([linear], contents=False) for linear in linears]
    kept = []
    for linear in linears:
        for parameter in linear.parameters():
            kept.append(parameter.data)
            parameter.data = parameter.data.clone()
    after = [module_versions([linear], contents=False) for linear in linears]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_versions_of_plain_modules_are_those_of_all():
    linear, norm = nn.Linear(4, 4), nn.RMSNorm(4)
    for trained in (True, False):
        assert plain_versions([linear, norm]) == (True, module_versions([linear, norm], contents=False))
        linear.requires_grad_(False)
        norm.requires_grad_(trained)
        with torch.no_grad():
            linear.weight.add_(1)
    assert plain_versions([linear.requires_grad_(False), norm.requires_grad_(False)])[0] is False
    marked = nn.Linear(4, 4)
    marked.weight.quant_state = None
    for more in (nn.Dropout(), nn.Sequential(linear), marked):
        assert plain_versions([norm, more]) is None

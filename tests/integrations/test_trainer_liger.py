"""Libraries that patch the same model: Liger-Kernel composes; one that replaces the attention's forward is named."""

import importlib
import logging
import types

import pytest
import torch
from transformers.models.llama import modeling_llama

from hf_geoscale import geometry_report, patch_model
from hf_geoscale.geometry import operand_bound
from hf_geoscale.integrations import geoscale_layers

from ..conftest import tiny_model, tokens


@pytest.fixture
def liger(monkeypatch):
    """Liger's patches; what they replace in transformers is put back afterwards, since Liger has no undo."""
    patches = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", modeling_llama.LlamaForCausalLM.forward)
    return patches


ORDERS = {
    "class first": lambda liger: (liger.apply_liger_kernel_to_llama(), patch_model(tiny_model("llama")))[1],
    "instance first": lambda liger: patch_model(on_instance(liger, tiny_model("llama"))),
    "instance after": lambda liger: on_instance(liger, patch_model(tiny_model("llama"))),
}


def on_instance(liger, model):
    liger._apply_liger_kernel_to_instance(model=model)
    return model


@pytest.mark.feature("Liger-Kernel")
@pytest.mark.parametrize("order", ORDERS)
class TestLiger:
    def test_composes(self, liger, order, caplog):
        """Its norms keep their gain, its rotation is a rotation: the certificates are those of the plain model."""
        with caplog.at_level(logging.WARNING):
            model = ORDERS[order](liger)
        assert "replaced the forward" not in caplog.text
        assert "Liger" in repr(model.model.layers[0].input_layernorm)
        assert modeling_llama.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
        assert model.config._attn_implementation == "geoscale"
        for layer, plain in zip(geoscale_layers(model), geoscale_layers(patch_model(tiny_model("llama"))), strict=True):
            assert torch.equal(layer.geometry.q_bound, plain.geometry.q_bound)
            torch.testing.assert_close(
                layer.geometry.q_bound, operand_bound(layer.site.projections()[0]), rtol=1e-12, atol=0
            )

    def test_its_blocks_call_our_attention(self, liger, order, monkeypatch):
        """On a CPU, with PyTorch in place of Liger's kernels, which need a GPU."""
        plain_rotary, ids = modeling_llama.apply_rotary_pos_emb, tokens(2, 24)
        expected = patch_model(tiny_model("llama")).model(ids).last_hidden_state  # before Liger changes what is built
        model = ORDERS[order](liger)
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", plain_rotary)
        for module in model.modules():
            if "RMSNorm" in repr(module).split("(")[0]:
                module.forward = types.MethodType(
                    lambda m, x: torch.nn.functional.rms_norm(x, x.shape[-1:], m.weight, 1e-6), module
                )
            elif hasattr(module, "gate_proj"):
                module.forward = lambda x, m=module: m.down_proj(
                    torch.nn.functional.silu(m.gate_proj(x)) * m.up_proj(x)
                )
        torch.testing.assert_close(model.model(ids).last_hidden_state, expected, rtol=1e-3, atol=1e-3)
        assert [row["calls"] for row in geometry_report(model).rows] == [1, 1]

    @pytest.mark.gpu
    def test_trains_with_its_kernels(self, liger, order):
        ids = tokens(2, 64).cuda()
        plain = patch_model(tiny_model("llama")).cuda().bfloat16()
        expected = plain(ids, labels=ids).loss.item()
        model = ORDERS[order](liger).cuda().bfloat16().train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=2**-7)
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert [(row["calls"], row["overflows"]) for row in geometry_report(model).rows] == [(1, 0)] * 2


@pytest.mark.feature("Replaced attention forward")
class TestReplacedForward:
    def foreign_forward(self, hidden_states, **kwargs):
        return self.o_proj(hidden_states), None

    def test_of_the_class_is_named(self, monkeypatch, caplog):
        monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", TestReplacedForward.foreign_forward)
        with caplog.at_level(logging.WARNING):
            patch_model(tiny_model("llama"))
        assert f"{__name__} replaced the forward of llama layer 0 (2 of 2 layers)" in caplog.text
        assert "FP8 attention will not run there" in caplog.text

    def test_of_one_instance_is_named(self, caplog):
        model = tiny_model("llama")
        attention = model.model.layers[1].self_attn
        attention.forward = TestReplacedForward.foreign_forward.__get__(attention)
        with caplog.at_level(logging.WARNING):
            patch_model(model)
        assert "replaced the forward of llama layer 1 (1 of 2 layers)" in caplog.text

    def test_wrappers_and_subclasses_are_not(self, caplog):
        hooks = importlib.import_module("accelerate.hooks")

        class Subclass(modeling_llama.LlamaAttention):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs)

        model = tiny_model("llama")
        hooks.add_hook_to_module(model.model.layers[0].self_attn, hooks.ModelHook())
        model.model.layers[1].self_attn.__class__ = Subclass
        with caplog.at_level(logging.WARNING):
            patch_model(model)
        assert "replaced the forward" not in caplog.text
        model(tokens(1, 20))
        assert [row["calls"] for row in geometry_report(model).rows] == [1, 1]

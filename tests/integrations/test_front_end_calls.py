"""Which modules and calls take the fused front end, and how it is taken away again."""

import copy
import functools
import types

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_geoscale import geometry_report, patch_model, unpatch_model
from hf_geoscale.integrations.front_end import FusedForward

from ..conftest import tiny_model, tokens
from ..tolerances import FLIPPED_ROUNDINGS
from .compare import relative
from .test_front_end import attention_of


@pytest.mark.feature("fused front end")
class TestWhichCalls:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_cache_takes_the_original_forward(self, family):
        model, ids = tiny_model(family), tokens(1, 70)
        interface = patch_model(model, fused_front_end=False).generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(patch_model(model).generate(ids, max_new_tokens=4, do_sample=False), interface)
        assert geometry_report(model).rows[0]["front_end_calls"] == 0

    def test_other_scalings_keep_to_the_interface(self):
        model = patch_model(tiny_model("llama"), scaling="delayed")
        assert "forward" not in attention_of(model).__dict__
        assert "delayed" in geometry_report(model).rows[0]["front_end"]

    @pytest.mark.parametrize("wraps", [False, True])
    def test_a_replaced_forward_is_left_alone(self, monkeypatch, wraps):
        def forward(self, *args, **kwargs):
            return original(self, *args, **kwargs)

        original = LlamaAttention.forward
        monkeypatch.setattr(LlamaAttention, "forward", functools.wraps(original)(forward) if wraps else forward)
        model = patch_model(tiny_model("llama"))
        assert "forward" not in attention_of(model).__dict__
        assert geometry_report(model).rows[0]["front_end"] == f"{__name__} replaced its forward"

    @pytest.mark.parametrize("wraps", [False, True])
    def test_a_wrapped_instance_is_left_alone_and_kept(self, wraps):
        model, ids, seen = tiny_model("llama"), tokens(1, 20), []
        attention = next(m for m in model.modules() if isinstance(m, LlamaAttention))
        original = attention.forward

        def forward(*args, **kwargs):
            seen.append(1)
            return original(*args, **kwargs)

        attention.forward = functools.wraps(original)(forward) if wraps else forward
        given = attention.forward
        patch_model(model)(ids, use_cache=False)
        assert "wrapped or replaced its forward" in geometry_report(model).rows[0]["front_end"]
        assert unpatch_model(model).model.layers[0].self_attn.forward is given
        assert len(seen) == 1

    def test_an_accelerate_hook_keeps_running(self):
        from accelerate.hooks import ModelHook, add_hook_to_module

        class Count(ModelHook):
            calls = 0

            def pre_forward(self, module, *args, **kwargs):
                Count.calls += 1
                return args, kwargs

        model, ids = tiny_model("llama"), tokens(1, 20)
        add_hook_to_module(model.model.layers[0].self_attn, Count())
        patch_model(model)(ids, use_cache=False)
        unpatch_model(model)(ids, use_cache=False)
        assert Count.calls == 2

    def test_a_hook_removed_later_leaves_nothing_that_stops_another_patch(self):
        from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

        model = patch_model(tiny_model("llama"))
        attention = attention_of(model)
        add_hook_to_module(attention, ModelHook())
        unpatch_model(model)
        remove_hook_from_module(attention)
        assert geometry_report(patch_model(model)).rows[0]["front_end"] == "fused"
        assert isinstance(attention_of(model).forward, FusedForward)

    def test_another_rotation_is_noticed(self, monkeypatch):
        def apply_rotary_pos_emb(q, k, cos, sin, **_):
            return q, k

        monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", apply_rotary_pos_emb)
        model = patch_model(tiny_model("llama"))
        assert geometry_report(model).rows[0]["front_end"] == f"{__name__} replaced apply_rotary_pos_emb"

    @pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2"])
    def test_a_window_is_that_of_the_class(self, family):
        """A config may carry a sliding_window that its class does not use."""
        model, ids = tiny_model(family), tokens(1, 40)
        model.config.sliding_window = 9
        interface = patch_model(model, backend="reference", fused_front_end=False)(ids).logits
        fused = patch_model(model, backend="reference")(ids, use_cache=False).logits
        assert relative(fused, interface) < FLIPPED_ROUNDINGS

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
    def test_training_with_the_cache_that_models_make_by_default(self, family):
        model, ids = tiny_model(family).train(), tokens(2, 24)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        interface = patch_model(model, backend="reference", fused_front_end=False)(input_ids=ids, labels=ids)
        fused = patch_model(model, backend="reference")(input_ids=ids, labels=ids)
        assert geometry_report(model).rows[0]["front_end_calls"] == 1
        torch.testing.assert_close(fused.loss, interface.loss, rtol=FLIPPED_ROUNDINGS, atol=0)
        for layer, other in zip(fused.past_key_values.layers, interface.past_key_values.layers, strict=True):
            assert relative(layer.keys, other.keys) < FLIPPED_ROUNDINGS
            assert relative(layer.values, other.values) < FLIPPED_ROUNDINGS

    def test_positions_of_each_sequence(self):
        model, ids = tiny_model("llama"), tokens(2, 30)
        positions = torch.stack([torch.arange(30), torch.arange(30) + 7])
        interface = patch_model(model, backend="reference", fused_front_end=False)(ids, position_ids=positions).logits
        fused = patch_model(model, backend="reference")(ids, position_ids=positions, use_cache=False).logits
        assert relative(fused, interface) < FLIPPED_ROUNDINGS

    def test_a_class_without_one_says_so(self):
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
        model = patch_model(GPTNeoXForCausalLM(GPTNeoXConfig(**shape, num_attention_heads=4)).eval())
        assert geometry_report(model).rows[0]["front_end"] == "GPTNeoXAttention has no fused forward"

    def test_another_implementation_set_later_is_honoured(self):
        model, ids = tiny_model("llama"), tokens(1, 20)
        plain = model(ids, use_cache=False).logits
        patch_model(model).set_attn_implementation("sdpa")
        assert torch.equal(model(ids, use_cache=False).logits, plain)


class TestReversible:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_unpatching_removes_it(self, family):
        model = patch_model(tiny_model(family))
        assert isinstance(attention_of(model).forward, FusedForward)
        attention = attention_of(model)
        unpatch_model(model)
        assert "forward" not in attention.__dict__

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_wrapped_one_calls_the_original_after_unpatching(self, family):
        """As accelerate's hooks do: they keep the forward they found and call it."""
        model, ids = tiny_model(family), tokens(1, 20)
        plain = model(ids, use_cache=False).logits
        attention = attention_of(patch_model(model))
        kept = attention.forward
        attention.forward = types.MethodType(lambda self, *args, **kwargs: kept(*args, **kwargs), attention)
        unpatch_model(model)
        assert torch.equal(model(ids, use_cache=False).logits, plain)

    def test_a_copy_runs_by_itself(self):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 20)
        other = copy.deepcopy(model)
        with torch.no_grad():
            attention_of(model).q_proj.weight.zero_()
        assert attention_of(other).forward.attention is attention_of(other)
        assert not torch.equal(model(ids, use_cache=False).logits, other(ids, use_cache=False).logits)
        assert geometry_report(other).rows[0]["front_end_calls"] == 1

"""patch_model, unpatch_model, refresh_scales: what they promise and what they refuse."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_geoscale import (
    GeoScaleConfig,
    NonFiniteWeightsError,
    UnsupportedAttentionError,
    UnsupportedModelError,
    geometry_report,
    patch_model,
    refresh_scales,
    unpatch_model,
)
from hf_geoscale.geometry import operand_bound
from hf_geoscale.integrations import geoscale_layers

from ..conftest import GPT2_SHAPE, SHAPE, tiny_model, tokens
from ..tolerances import OUTPUT_ERROR


def bounds(model) -> list[torch.Tensor]:
    return [layer.geometry.q_bound for layer in geoscale_layers(model)]


class TestPatching:
    def test_a_second_model_of_the_same_config_is_not_switched(self):
        config = LlamaConfig(**SHAPE)
        first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
        ids = tokens(1, 20)
        before = second(ids).logits
        patch_model(first)
        assert second.config is config
        assert second.config._attn_implementation == "sdpa"
        assert torch.equal(second(ids).logits, before)
        third = LlamaForCausalLM(config)
        assert third.config._attn_implementation == "sdpa"
        assert first.config._attn_implementation == "geoscale"
        assert first.model.layers[0].self_attn.config is first.config

    def test_twice_is_once(self):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 20)
        once, layers = model(ids).logits, geoscale_layers(model)
        assert patch_model(model) is model
        assert geoscale_layers(model) == layers
        assert torch.equal(model(ids).logits, once)
        unpatch_model(model)
        assert model.config._attn_implementation == "sdpa"

    def test_another_configuration_replaces_the_first(self):
        model = patch_model(tiny_model("llama"))
        patch_model(model, precision="high", headroom=4.0)
        assert {layer.config.precision for layer in geoscale_layers(model)} == {"high"}
        unpatch_model(model)
        assert model.config._attn_implementation == "sdpa"

    def test_eager_is_restored(self):
        model, ids = tiny_model("llama"), tokens(1, 20)
        model.set_attn_implementation("eager")
        before = model(ids).logits
        unpatch_model(patch_model(model))
        assert model.config._attn_implementation == "eager"
        assert torch.equal(model(ids).logits, before)

    def test_parameters_and_state_dict_are_untouched(self):
        model = tiny_model("llama")
        before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
        patch_model(model)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(after[n].data_ptr() == pointer and torch.equal(after[n], v) for n, (pointer, v) in before.items())

    def test_print_shows_the_numerics(self):
        model = patch_model(tiny_model("llama"))
        assert str(model).count("geoscale: E4M3, certified") == 2
        assert "geoscale" not in str(unpatch_model(model))

    def test_a_pickled_model_runs_in_a_new_process(self, tmp_path):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 20)
        torch.save((model, ids, model(ids).logits), tmp_path / "model.pt")
        code = (
            "import sys, torch; model, ids, logits = torch.load(sys.argv[1], weights_only=False); "
            "print(torch.equal(model(ids).logits, logits))"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.strip() == "True", done.stderr

    def test_headless_model(self):
        model = tiny_model("llama").model
        ids = tokens(1, 20)
        before = model(ids).last_hidden_state
        patch_model(model)
        assert not torch.equal(model(ids).last_hidden_state, before)
        assert geometry_report(model).rows[0]["calls"] == 1

    def test_unpatching_an_unpatched_model_does_nothing(self):
        model = tiny_model("gpt2")
        assert unpatch_model(model) is model


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
        assert after["q_amax"] is after["alpha_observed"] is after["logit_amax"] is None  # of other weights
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

    def test_scales_made_in_inference_mode_serve_training(self):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 20)
        self.change(model, "norm gain")
        with torch.inference_mode():
            mask = torch.ones(20, 20).tril().bool()[None, None]
            model(ids, attention_mask=mask)
            first = model(ids, attention_mask=mask).logits
            mask[..., 10:, :10] = False  # no version counter tells of this
            assert not torch.equal(model(ids, attention_mask=mask).logits, first)
        model(ids, labels=ids).loss.backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad.any()

    def test_an_unchanged_model_is_not_measured_again(self, monkeypatch):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 20)
        monkeypatch.setattr("hf_geoscale.integrations.layer.measure_layer", None)
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


class TestRefusals:
    def test_unknown_family(self):
        model = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=2))
        implementation = model.config._attn_implementation
        with pytest.raises(UnsupportedModelError, match=r"'bloom'.*ALiBi.*gpt2, .*llama, .*mistral, .*fallback='sdpa'"):
            patch_model(model)
        assert model.config._attn_implementation == implementation

    def test_unknown_family_left_to_sdpa_and_counted(self, caplog):
        config = BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2)
        model, ids = BloomForCausalLM(config).eval(), tokens(1, 10)
        before = model(ids).logits
        with caplog.at_level(logging.WARNING):
            patch_model(model, fallback="sdpa")
        assert "'bloom' is not supported" in caplog.text
        assert torch.equal(model(ids).logits, before)
        rows = geometry_report(model).rows
        assert [row["fallback_reasons"] for row in rows] == [{"unsupported model": 1}] * 2
        assert [row["calls"] for row in rows] == [0, 0]
        unpatch_model(model)
        model(ids)
        with pytest.raises(ValueError, match="patch_model"):
            geometry_report(model)

    def test_not_a_transformers_model(self):
        with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
            patch_model(nn.Linear(2, 2))

    def test_head_size_that_does_not_fit(self):
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "hidden_size": 96}))
        with pytest.raises(UnsupportedModelError, match="multiple of 16 up to 256, got 24"):
            patch_model(model)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize(("name", "operand"), [("k_proj", "k"), ("v_proj", "v")])
    def test_non_finite_weights(self, value, name, operand):
        model = tiny_model("llama")
        with torch.no_grad():
            getattr(model.model.layers[1].self_attn, name).weight[3, 5] = value
        with pytest.raises(NonFiniteWeightsError, match=f"make {operand} in layer 1 hold NaN or Inf"):
            patch_model(model)
        assert model.config._attn_implementation == "sdpa"
        assert not geoscale_layers(model)

    def test_a_refresh_that_fails_keeps_the_old_scales(self):
        model = patch_model(tiny_model("llama"))
        old = [b.clone() for b in bounds(model)]
        model.model.layers[1].self_attn.q_proj.weight.data.fill_(float("nan"))
        model.model.layers[0].self_attn.q_proj.weight.data.mul_(2)
        with pytest.raises(NonFiniteWeightsError, match="layer 1"):
            refresh_scales(model)
        assert all(torch.equal(a, b) for a, b in zip(bounds(model), old, strict=True))

    def test_cross_attention(self):
        model = GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE, add_cross_attention=True))
        with pytest.raises(UnsupportedModelError, match="cross-attention"):
            patch_model(model)

    def test_adapters_quantised_and_sharded_weights(self):
        model = tiny_model("llama")
        attention = model.model.layers[0].self_attn
        plain = attention.q_proj

        class Adapter(nn.Module):
            base_layer, weight = plain, plain.weight

        attention.q_proj = Adapter()
        with pytest.raises(UnsupportedModelError, match=r"q_proj is a Adapter adapter.*merge"):
            patch_model(model)

        class LoRALinear(nn.Linear):
            pass

        attention.q_proj = LoRALinear(64, 64, bias=False)
        with pytest.raises(UnsupportedModelError, match=r"q_proj is a LoRALinear; only nn.Linear and Conv1D"):
            patch_model(model)
        attention.q_proj = nn.Linear(2, 2)
        with pytest.raises(UnsupportedModelError, match=r"shape \(64, 64\), got \(2, 2\)"):
            patch_model(model)
        packed = nn.Linear(64, 64)
        packed.weight = nn.Parameter(torch.zeros(2048, 1, dtype=torch.uint8), requires_grad=False)
        attention.q_proj = packed
        with pytest.raises(UnsupportedModelError, match=r"q_proj holds torch.uint8 weights"):
            patch_model(model)
        attention.q_proj = nn.Linear(64, 64, device="meta")
        with pytest.raises(UnsupportedModelError, match="meta device"):
            patch_model(model)

    def test_an_adapter_added_after_patching_is_refused_at_the_next_forward(self):
        model = patch_model(tiny_model("llama"))
        attention = model.model.layers[0].self_attn

        class Adapter(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base_layer = base
                self.lora = nn.Linear(64, 64, bias=False)

            def forward(self, x):
                return self.base_layer(x) + self.lora(x)

        attention.q_proj = Adapter(attention.q_proj)
        with pytest.raises(UnsupportedModelError, match="adapter"):
            model(tokens(1, 8))

    def test_the_name_without_patching(self):
        patch_model(tiny_model("llama"))  # registers the name
        model = tiny_model("llama")
        model.set_attn_implementation("geoscale")
        with pytest.raises(UnsupportedModelError, match="never patched"):
            model(tokens(1, 8))

    def test_unknown_norm(self):
        model = tiny_model("llama")
        model.model.layers[0].input_layernorm = nn.Identity()
        with pytest.raises(UnsupportedModelError, match="Identity is not a LayerNorm or RMSNorm"):
            patch_model(model)


class TestMasks:
    def test_honoured_4d_masks(self):
        model, ids = tiny_model("llama"), tokens(2, 24)
        causal = torch.ones(24, 24).tril().bool()
        blocks = causal & (torch.arange(24)[:, None] // 10 == torch.arange(24) // 10)
        boolean = torch.stack([causal, blocks])[:, None]
        additive = torch.zeros(2, 1, 24, 24).masked_fill(~boolean, torch.finfo(torch.float32).min)
        exact = model(ids, attention_mask=boolean).logits
        patch_model(model)
        ours = [model(ids, attention_mask=mask).logits for mask in (boolean, additive)]
        assert torch.equal(*ours)
        assert float((ours[0] - exact).norm() / exact.norm()) < OUTPUT_ERROR
        assert geometry_report(model).rows[0]["calls"] == 2

    @pytest.mark.parametrize("kind", ["hole", "bias", "per head"])
    def test_masks_that_cannot_be_honoured(self, kind):
        model, ids = tiny_model("llama"), tokens(1, 24)
        mask = torch.zeros(1, 1, 24, 24).masked_fill(torch.ones(24, 24).triu(1).bool(), torch.finfo(torch.float32).min)
        if kind == "hole":
            mask[..., 10:, 5] = torch.finfo(torch.float32).min
        elif kind == "bias":
            mask[..., 10, 5] = -0.5
        else:
            mask = mask.repeat(1, 4, 1, 1)
            mask[:, 1, 20, 0] = torch.finfo(torch.float32).min
        exact = model(ids, attention_mask=mask).logits
        patch_model(model)
        with pytest.raises(UnsupportedAttentionError, match=r"\(1, [14], 24, 24\) of torch.float32.*fallback='sdpa'"):
            model(ids, attention_mask=mask)
        patch_model(model, fallback="sdpa")
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, exact)
        row = geometry_report(model).rows[0]
        assert row["calls"] == 0
        assert row["fallback_calls"] == 1

    def test_a_mask_changed_in_place_is_read_again(self):
        model, ids = patch_model(tiny_model("llama"), fallback="sdpa"), tokens(1, 24)
        mask = torch.ones(24, 24).tril().bool()[None, None].clone()
        first = model(ids, attention_mask=mask).logits
        mask[..., 12:, :12] = False
        assert not torch.equal(model(ids, attention_mask=mask).logits, first)

    def test_padding_with_a_hole(self):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 24)
        mask = torch.ones_like(ids)
        mask[:, 10] = 0
        with pytest.raises(UnsupportedAttentionError, match="no range of keys"):
            model(ids, attention_mask=mask)

    def test_what_neither_fp8_nor_sdpa_has_is_refused_even_with_a_fallback(self):
        model = patch_model(tiny_model("llama"), fallback="sdpa")
        with pytest.raises(UnsupportedAttentionError, match="attention probabilities"):
            model(tokens(1, 8), output_attentions=True)
        attention = model.model.layers[0].self_attn
        x = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)
        from hf_geoscale.integrations.attention import geoscale_attention_forward

        for option, named in (({"softcap": 30.0}, "soft cap"), ({"s_aux": torch.zeros(4)}, "attention sinks")):
            with pytest.raises(UnsupportedAttentionError, match=named):
                geoscale_attention_forward(attention, *x, None, **option)

    def test_one_mask_for_the_whole_batch(self):
        model, ids = tiny_model("llama"), tokens(2, 24)
        mask = torch.ones(24, 24).tril().bool()[None, None]
        exact = model(ids, attention_mask=mask).logits
        patch_model(model)
        assert float((model(ids, attention_mask=mask).logits - exact).norm() / exact.norm()) < OUTPUT_ERROR


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("bound", "guessed"),
            ("precision", "low"),
            ("backend", "cuda"),
            ("fallback", "eager"),
            ("headroom", 0.5),
            ("failure_prob", 0.0),
            ("max_length", 0),
            ("bound", "rank_aware"),
        ],
    )
    def test_bad_values_are_named(self, field, value):
        with pytest.raises(ValueError, match=f"{field}.*{value!r}"):
            GeoScaleConfig(**{field: value})

    def test_frozen_and_overridable(self):
        config = GeoScaleConfig()
        with pytest.raises(AttributeError):
            config.headroom = 2.0
        model = patch_model(copy.deepcopy(tiny_model("llama")), config, headroom=2.0)
        assert geoscale_layers(model)[0].config == GeoScaleConfig(headroom=2.0)
        with pytest.raises(TypeError, match="colour"):
            patch_model(model, colour="red")

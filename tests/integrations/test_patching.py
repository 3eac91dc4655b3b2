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
    UnsupportedModelError,
    geometry_report,
    patch_model,
    refresh_scales,
    unpatch_model,
)
from hf_geoscale.integrations import geoscale_layers

from ..conftest import GPT2_SHAPE, SHAPE, tiny_model, tokens


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
            refresh_scales(model, wait=True)
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

    def test_unknown_norm(self):
        model = tiny_model("llama")
        model.model.layers[0].input_layernorm = nn.Identity()
        with pytest.raises(UnsupportedModelError, match="Identity, run on random rows"):
            patch_model(model)


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

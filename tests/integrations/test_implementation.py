"""Every patched attention reads the implementation that was set, whatever config object it holds; others keep theirs."""

import copy
import io
import logging

import pytest
import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from hf_geoscale import (
    UnsupportedAttentionError,
    geometry_report,
    patch_model,
    refresh_scales,
    unpatch_model,
)
from hf_geoscale.integrations import geoscale_layers

from ..conftest import SHAPE, tiny_model, tokens

FP8_ERROR = 0.15
"""Relative error of FP8 against SDPA in the logits of these models, several times the ordinary 0.05; a layer without its padding
mask is off by 0.5 and more."""


def expanded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Copies of both layers behind them, as LLaMA-Pro's block expansion."""
    layers = [copy.deepcopy(layer) if again else layer for layer in model.model.layers for again in (False, True)]
    return with_layers(model, layers)


def with_layers(model: LlamaForCausalLM, layers: list[nn.Module]) -> LlamaForCausalLM:
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = ["full_attention"] * len(layers)
    return model


def with_saved_layer(model: LlamaForCausalLM) -> LlamaForCausalLM:
    buffer = io.BytesIO()
    torch.save(model.model.layers[1], buffer)
    buffer.seek(0)
    model.model.layers[1] = torch.load(buffer, weights_only=False)
    return model


def with_config(model: nn.Module, **changes) -> nn.Module:
    """Another object for every attention, which says something else than the model's."""
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.config = copy.deepcopy(module.config)
            module.config.update(changes)
    return model


def headed(kind):
    def build(model):
        torch.manual_seed(1)
        whole = kind(model.config).eval()
        setattr(whole, whole.base_model_prefix, model.model)
        return whole

    return build


MODELS = {
    "expanded": expanded,
    "transplanted": lambda m: with_layers(m, [tiny_model("llama", seed=1).model.layers[0], m.model.layers[1]]),
    "saved and loaded": with_saved_layer,
    "of another name": lambda m: with_config(m, name_or_path="elsewhere", initializer_range=0.5),
    "sequence classification": headed(LlamaForSequenceClassification),
    "token classification": headed(LlamaForTokenClassification),
    "question answering": headed(LlamaForQuestionAnswering),
}


def call_of(padding: str | None) -> dict:
    ids, mask = tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    if padding is not None:
        mask[0, slice(0, 5) if padding == "left" else slice(11, 16)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compared(out, call: dict) -> torch.Tensor:
    """What padding does not reach."""
    found = out.start_logits[..., None] if hasattr(out, "start_logits") else out.logits
    return found[call["attention_mask"].bool()] if found.dim() == 3 else found


def implementations(model) -> set[str]:
    return {m.config._attn_implementation for m in model.modules() if type(m).__name__.endswith("Attention")}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_runs_in_fp8_and_is_undone(name, padding):
    model, call = MODELS[name](tiny_model("llama")).eval(), call_of(padding)
    with torch.no_grad():
        sdpa = model(**call)
        patch_model(model)
        fp8 = model(**call)
        rows = geometry_report(model).rows
        assert len(rows) >= 2
        assert {(row["calls"], row["fallback_calls"]) for row in rows} == {(1, 0)}
        difference = (compared(fp8, call) - compared(sdpa, call)).norm() / compared(sdpa, call).norm()
        assert 0 < float(difference) < FP8_ERROR
        unpatch_model(model)
        assert torch.equal(compared(model(**call), call), compared(sdpa, call))
    assert implementations(model) == {"sdpa"}


@pytest.mark.parametrize("replicated_first", [True, False])
@pytest.mark.parametrize("padding", [None, "left"])
def test_layer_replication(replicated_first, padding):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], r=2)
    base, call = tiny_model("llama"), call_of(padding)
    control = peft.get_peft_model(copy.deepcopy(base), config).eval()
    if not replicated_first:
        patch_model(base)
    model = peft.get_peft_model(base, config).eval()
    if replicated_first:
        patch_model(model)
    model.load_state_dict(control.state_dict())
    with torch.no_grad():
        sdpa, fp8 = compared(control(**call), call), compared(model(**call), call)
        assert [row["calls"] for row in geometry_report(model).rows] == [1, 1, 1]
        assert 0 < float((fp8 - sdpa).norm() / sdpa.norm()) < FP8_ERROR
        assert torch.equal(compared(unpatch_model(model)(**call), call), sdpa)


class TestOtherModels:
    def test_that_share_a_layers_config_are_not_switched(self):
        config = LlamaConfig(**SHAPE)
        donor, model = LlamaForCausalLM(config), tiny_model("llama")
        with_layers(model, [donor.model.layers[0], model.model.layers[1]])
        patch_model(model)
        assert config._attn_implementation == "sdpa"
        assert donor.config is config
        assert implementations(model) == {"geoscale"}
        other = LlamaForCausalLM(config)
        assert implementations(other) == {"sdpa"}

    def test_inside_a_patched_model_keep_theirs(self):
        """A tower of another kind in a text model of the user's own."""
        from transformers import CLIPVisionConfig, CLIPVisionModel

        model = tiny_model("llama")
        tower = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        model.vision = CLIPVisionModel(tower)
        model.vision.set_attn_implementation("eager")
        patch_model(model)
        assert model.vision.config._attn_implementation == "eager"
        unpatch_model(model)
        assert model.vision.config._attn_implementation == "eager"

    def test_a_layer_gets_back_what_it_had(self):
        model = tiny_model("llama")
        model.model.layers[0].self_attn.config = copy.deepcopy(model.config)
        model.model.layers[0].self_attn.config._attn_implementation = "eager"
        patch_model(model)
        assert implementations(model) == {"geoscale"}
        unpatch_model(model)
        found = [layer.self_attn.config._attn_implementation for layer in model.model.layers]
        assert found == ["eager", "sdpa"]


def neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    shape = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape)).eval()


def attentions(model) -> list[nn.Module]:
    return [layer.site.attention for layer in geoscale_layers(model)]


@pytest.mark.parametrize("build", [lambda: tiny_model("llama"), neox], ids=["fused", "interface"])
class TestSwitchedLater:
    def switched(self, build):
        """A model of which somebody gave one layer another implementation."""
        model = patch_model(build())
        first = attentions(model)[0]
        first.config = copy.deepcopy(first.config)
        first.config._attn_implementation = "sdpa"
        return model

    def test_is_printed_reported_and_said_once(self, build, caplog):
        model = self.switched(build)
        assert str(model).count("geoscale: not in FP8 (its config says attn_implementation='sdpa')") == 1
        assert str(model).count("geoscale: E4M3") == 1
        with caplog.at_level(logging.WARNING), torch.no_grad():
            model(tokens(1, 16)), model(tokens(1, 16))
        assert caplog.text.count("layer 0 is patched, but its config says attn_implementation='sdpa'") == 1
        rows = geometry_report(model).rows
        assert [row["calls"] for row in rows] == [0, 2]
        assert rows[0]["fallback_reasons"] == {"attn_implementation='sdpa'": 2}
        assert rows[0]["front_end"] == "its config says attn_implementation='sdpa'"

    def test_of_a_whole_model_one_warning(self, build, caplog):
        model = patch_model(build())
        model.set_attn_implementation("sdpa")
        with caplog.at_level(logging.WARNING), torch.no_grad():
            model(tokens(1, 16)), model(tokens(1, 16))
        assert caplog.text.count("its config says attn_implementation='sdpa'") == 1
        assert [row["fallback_calls"] for row in geometry_report(model).rows] == [2, 2]
        assert "geoscale: not in FP8" in str(model)
        assert "geoscale: E4M3" not in str(model)

    def test_a_mask_it_cannot_read_is_refused(self, build):
        with pytest.raises(UnsupportedAttentionError, match=r"layer 0 is patched.*'sdpa'.*patch_model\(model\) again"):
            self.switched(build)(**call_of("left"))

    def test_patching_again_switches_it_back(self, build):
        model = self.switched(build)
        patch_model(model)
        assert implementations(model) == {"geoscale"}
        model(**call_of("left"))
        assert [row["calls"] for row in geometry_report(model).rows] == [1, 1]

    def test_unpatching_leaves_what_was_chosen(self, build):
        model = self.switched(build)
        attentions(model)[0].config._attn_implementation = "eager"
        names = [attention.config for attention in attentions(model)]
        unpatch_model(model)
        assert [config._attn_implementation for config in names] == ["eager", "sdpa"]


class TestAddedLater:
    def test_is_reported_said_and_patched_at_the_next_call(self, caplog):
        model, other = patch_model(tiny_model("llama")), tiny_model("llama", seed=1)
        with_layers(model, [*model.model.layers, other.model.layers[0]])
        with caplog.at_level(logging.WARNING):
            refresh_scales(model)
            rows = geometry_report(model).rows
        assert caplog.text.count("model.layers.2.self_attn (1 of 3 layers) was added after patching") == 1
        assert [row["front_end"][:5] for row in rows] == ["fused", "fused", "added"]
        patch_model(model)
        with torch.no_grad():
            fp8 = model(**call_of("left")).logits
        assert [row["calls"] for row in geometry_report(model).rows] == [1, 1, 1]
        with torch.no_grad():
            sdpa = unpatch_model(model)(**call_of("left")).logits
        mask = call_of("left")["attention_mask"].bool()
        assert float((fp8 - sdpa)[mask].norm() / sdpa[mask].norm()) < FP8_ERROR

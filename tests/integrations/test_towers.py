"""Multimodal models: the tower that can be patched is named, and patching it leaves the other towers alone."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from hf_geoscale import UnsupportedModelError, geometry_report, patch_model, unpatch_model
from hf_geoscale.integrations import patched_layers

from ..conftest import SHAPE

IMAGE, IMAGE_TOKENS = 4, 4


def llava(text) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def gemma3() -> Gemma3ForConditionalGeneration:
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    config = Gemma3Config(
        vision_config=vision, text_config=text, mm_tokens_per_image=IMAGE_TOKENS, image_token_index=IMAGE
    )
    return Gemma3ForConditionalGeneration(config).eval()


MODELS = {
    "llava of llama": lambda: llava(LlamaConfig(**SHAPE)),
    "llava of qwen2": lambda: llava(Qwen2Config(**SHAPE)),
    "gemma3": gemma3,
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def batch(model) -> dict:
    ids = torch.randint(5, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    ids[:, 3 : 3 + IMAGE_TOKENS] = IMAGE
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    call = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "gemma3":
        call["token_type_ids"] = (ids == IMAGE).long()
    return call


def tower(model) -> nn.Module:
    return model.model.language_model


def vision(model) -> nn.Module:
    return model.model.vision_tower


def configs(module: nn.Module) -> list[tuple[int, str]]:
    """Every config object of a module, with the name in it."""
    found = [m.__dict__["config"] for m in module.modules() if "config" in m.__dict__]
    return [(id(config), config._attn_implementation) for config in found]


class TestTheWholeModel:
    def test_is_refused_with_the_towers_path(self, model):
        before = configs(model)
        with pytest.raises(UnsupportedModelError, match=r"is: patch_model\(model\.model\.language_model\)$") as refused:
            patch_model(model)
        assert configs(model) == before
        expression = str(refused.value).rpartition("patch_model")[2]
        assert eval(expression, {"model": model}) is tower(model)

    def test_in_peft(self, model):
        peft = pytest.importorskip("peft")
        outer = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(
            UnsupportedModelError, match=r"patch_model\(model\.base_model\.model\.model\.language_model\)"
        ):
            patch_model(outer)

    def test_with_the_name_alone(self, model):
        model.config._attn_implementation = "geoscale"  # of all towers, as `from_pretrained` sets it
        with pytest.raises(UnsupportedModelError, match=r"is: patch_model\(model\.model\.language_model\)"):
            model(**batch(model))
        unpatch_model(model)
        assert {name for _, name in configs(model)} == {"sdpa"}
        model(**batch(model))

    def test_is_left_to_sdpa_and_counted(self, model):
        patch_model(model, fallback="sdpa")
        model(**batch(model))
        rows = geometry_report(model).rows
        assert sum(row["calls"] for row in rows) == 0
        assert all(row["fallback_calls"] == 1 for row in rows)
        unpatch_model(model)
        assert not patched_layers(model)


class TestTheTower:
    def test_runs_in_fp8_and_is_undone(self, model):
        call = batch(model)
        sdpa = model(**call).logits
        patch_model(tower(model))
        fp8 = model(**call).logits
        assert [row["calls"] for row in geometry_report(model).rows] == [1, 1]
        assert 0 < float((fp8 - sdpa).norm() / sdpa.norm()) < 0.15
        unpatch_model(tower(model))
        assert torch.equal(model(**call).logits, sdpa)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("outside_in", [False, True])
    def test_leaves_the_others_alone(self, model, implementation, outside_in):
        vision(model).set_attn_implementation(implementation)
        parent, others = model.config, configs(vision(model))
        named = [config._attn_implementation for config in (parent, parent.text_config, parent.vision_config)]
        patch_model(tower(model))
        assert configs(vision(model)) == others
        assert tower(model).config._attn_implementation == "geoscale"
        assert model.config is parent
        assert [c._attn_implementation for c in (parent, parent.text_config, parent.vision_config)] == named
        unpatch_model(model if outside_in else tower(model))
        assert configs(vision(model)) == others
        assert tower(model).config._attn_implementation == named[1]
        assert [c._attn_implementation for c in (parent, parent.text_config, parent.vision_config)] == named

    def test_by_name(self, model):
        """attn_implementation={"text_config": "geoscale"} names the tower alone."""
        call = batch(model)
        expected = copy.deepcopy(model)
        patch_model(tower(expected))
        model.config._attn_implementation = {"text_config": "geoscale"}
        assert vision(model).config._attn_implementation == "sdpa"
        assert torch.equal(model(**call).logits, expected(**call).logits)
        assert {id(layer.site.model) for layer in patched_layers(model)} == {id(tower(model))}

    def test_generates_and_trains(self, model):
        patch_model(tower(model))
        call = batch(model)
        model.generate(**call, max_new_tokens=3, do_sample=False)
        model.train()(**call, labels=call["input_ids"]).loss.backward()
        gradients = [p.grad for p in tower(model).layers.parameters()]
        assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)

    def test_the_whole_is_saved_and_loaded_as_before(self, model, tmp_path):
        patch_model(tower(model))
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert {name for _, name in configs(again)} == {"sdpa"}


def test_a_model_whose_text_tower_is_of_no_supported_family():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={**SHAPE, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4]}},
        vision_config={"embed_dim": 32, "hidden_size": 64, "depth": 1, "num_heads": 2},
    )
    model = Qwen2VLForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match="Its text tower 'qwen2_vl_text' is not supported either"):
        patch_model(model)

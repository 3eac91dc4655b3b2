"""Undoing, refreshing and reporting through whatever is around a patched model, and out of every state."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_geoscale import GeoScaleConfig, geometry_report, patch_model, refresh_scales, unpatch_model
from hf_geoscale.integrations import (
    geoscale_layers,
    load_scaling_state_dict,
    patched_layers,
    scaling_state_dict,
)

from ..conftest import tiny_model, tokens


class Regressor(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(96, 1)

    def forward(self, ids):
        return self.head(self.backbone(ids).logits.mean(1))


class Engine(nn.Module):
    """As DeepSpeed's: forwards attributes to the model inside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    dist.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{tmp_path_factory.mktemp('group')}/store"
    )
    yield
    dist.destroy_process_group()


def peft_of(kind):
    def wrap(model):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj"])
        if kind == "mixed":
            return peft.PeftMixedModel(model, config, "default")
        if kind == "tuner":
            return peft.tuners.lora.LoraModel(model, config, "default")
        if kind == "prompt":
            config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        return peft.get_peft_model(model, config)

    return wrap


WRAPPERS = {
    "own module": Regressor,
    "engine": Engine,
    "list": lambda model: nn.ModuleList([model]),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": torch.nn.DataParallel,
    "DDP": torch.nn.parallel.DistributedDataParallel,
    "PEFT": peft_of("lora"),
    "PEFT mixed": peft_of("mixed"),
    "PEFT tuner": peft_of("tuner"),
    "PEFT prompt": peft_of("prompt"),
    "PEFT in a module": lambda model: Regressor(peft_of("lora")(model)),
    "the backbone": lambda model: model.model,
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", WRAPPERS)
class TestWrappers:
    def test_everything_but_patching_goes_through(self, name):
        model, ids = tiny_model("llama"), tokens(2, 16)
        before = model(ids).logits
        patch_model(model)
        outer = WRAPPERS[name](model)
        model(ids)
        refresh_scales(outer)
        assert [row["calls"] for row in geometry_report(outer).rows] == [1, 1]
        assert [row["family"] for row in geometry_report(outer).rows] == ["llama", "llama"]
        assert len(scaling_state_dict(outer)) == 2
        load_scaling_state_dict(outer, scaling_state_dict(outer))
        assert unpatch_model(outer) is outer
        assert model.config._attn_implementation == "sdpa"
        assert not patched_layers(model)
        assert not [m for m in model.modules() if any(key.startswith("geoscale") for key in vars(m))]
        assert torch.equal(model(ids).logits, before)
        patch_model(model)  # and there is a way back
        assert not torch.equal(model(ids).logits, before)

    def test_a_model_left_with_the_name_alone_is_mended(self, name):
        """What unpatching through a wrapper once left behind."""
        model, ids = tiny_model("llama"), tokens(2, 16)
        before = model(ids).logits
        model.set_attn_implementation("geoscale")
        unpatch_model(WRAPPERS[name](model))
        assert model.model.config._attn_implementation == "sdpa"
        assert torch.equal(model(ids).logits, before)


class TestPeftOfAnyKind:
    @pytest.mark.parametrize("kind", ["lora", "mixed", "tuner", "prompt"])
    def test_is_patched(self, kind):
        outer = peft_of(kind)(tiny_model("llama")).eval()
        with torch.no_grad():
            sdpa = outer(input_ids=tokens(1, 16)).logits
            patch_model(outer)
            fp8 = outer(input_ids=tokens(1, 16)).logits
            assert [row["calls"] for row in geometry_report(outer).rows] == [1, 1]
            assert 0 < float((fp8 - sdpa).norm() / sdpa.norm()) < 0.15
            unpatch_model(outer)
            assert torch.equal(outer(input_ids=tokens(1, 16)).logits, sdpa)


class TestRefused:
    @pytest.mark.parametrize(
        ("function", "name"),
        [(unpatch_model, "unpatch_model"), (refresh_scales, "refresh_scales"), (geometry_report, "geometry_report")],
    )
    @pytest.mark.parametrize("given", [None, "folder", {}])
    def test_what_is_no_module(self, function, name, given):
        with pytest.raises(TypeError, match=f"{name} expects .* got {type(given).__name__}"):
            function(given)

    def test_patching_a_wrapper(self):
        with pytest.raises(
            TypeError, match=r"patch_model expects .* got Regressor; patch the base model before wrapping"
        ):
            patch_model(Regressor(tiny_model("llama")))

    def test_patching_a_name(self):
        with pytest.raises(TypeError, match=r"patch_model expects .* got 'HuggingFaceTB/SmolLM2-135M'; load it first"):
            patch_model("HuggingFaceTB/SmolLM2-135M")

    def test_unpatching_one_layer_touches_nothing(self):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 16)
        before = model(ids).logits
        with pytest.raises(TypeError, match="LlamaDecoderLayer, a part of the patched LlamaForCausalLM"):
            unpatch_model(model.model.layers[0])
        assert len(geoscale_layers(model)) == 2
        assert torch.equal(model(ids).logits, before)

    def test_a_patch_that_fails_leaves_the_model(self, monkeypatch):
        model, ids = tiny_model("llama"), tokens(1, 16)
        before = model(ids).logits
        monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
        with pytest.raises(ValueError, match="does not use transformers' attention interface"):
            patch_model(model)
        assert model.config._attn_implementation == "sdpa"
        assert not patched_layers(model)
        assert torch.equal(model(ids).logits, before)


class Pair(nn.Module):
    """A policy and its reference, as preference training holds them."""

    def __init__(self, policy, reference):
        super().__init__()
        self.policy, self.reference = policy, reference


class TestTwoModelsInOneModule:
    """Each function takes all of them: they are undone and refreshed together, and reported one after another."""

    def pair(self):
        return Pair(patch_model(tiny_model("llama")), patch_model(tiny_model("gpt2"), precision="high"))

    def test_are_reported_one_after_another(self):
        rows = geometry_report(self.pair()).rows
        assert [(row["layer"], row["family"]) for row in rows] == [(0, "llama"), (1, "llama"), (2, "gpt2"), (3, "gpt2")]

    def test_are_refreshed_together(self):
        pair = self.pair()
        with torch.no_grad():
            for parameter in pair.parameters():
                parameter.data.mul_(1.5)
        refresh_scales(pair)
        again = Pair(copy.deepcopy(pair.policy), copy.deepcopy(pair.reference))
        refresh_scales(again.policy), refresh_scales(again.reference)
        for mine, theirs in zip(geoscale_layers(pair), geoscale_layers(again), strict=True):
            assert torch.equal(mine.geometry.q_bound, theirs.geometry.q_bound)

    def test_are_undone_each_to_its_own(self):
        pair = Pair(tiny_model("llama"), tiny_model("gpt2"))
        pair.reference.set_attn_implementation("eager")
        patch_model(pair.policy), patch_model(pair.reference)
        unpatch_model(pair)
        assert pair.policy.config._attn_implementation == "sdpa"
        assert pair.reference.config._attn_implementation == "eager"

    def test_one_of_them_alone(self):
        pair = self.pair()
        unpatch_model(pair.policy)
        assert len(patched_layers(pair.policy)) == 0
        assert {layer.config for layer in geoscale_layers(pair)} == {GeoScaleConfig(precision="high")}
        refresh_scales(pair)
        unpatch_model(pair)
        assert not patched_layers(pair)

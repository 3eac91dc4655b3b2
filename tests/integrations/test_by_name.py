"""Models that were given the name alone, attn_implementation="geoscale": patched whole in their first forward, or refused."""

import copy
import json
import logging
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from hf_geoscale import (
    GeoScaleCallback,
    GeoScaleConfig,
    UnsupportedModelError,
    geometry_report,
    patch_model,
    unpatch_model,
)
from hf_geoscale.integrations import geoscale_layers, patched_layers

from ..conftest import SHAPE, tiny_model, tokens
from ..tolerances import FLIPPED_ROUNDINGS, FUSED_RUNS
from .test_callback import trainer

FAMILIES = ["llama", "mistral-window", "qwen3", "gpt2"]


def named(model):
    """The model as `from_pretrained(..., attn_implementation="geoscale")` leaves it."""
    model.config._attn_implementation = "geoscale"
    return model


def padded() -> dict:
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


class TestFirstForward:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_computes_what_patching_before_would_have(self, name):
        call = padded()
        expected = patch_model(tiny_model(name))(**call).logits
        sdpa = tiny_model(name)(**call).logits
        model = named(tiny_model(name))
        assert torch.equal(model(**call).logits, expected)
        assert not torch.equal(sdpa, expected)
        assert {layer.front_end for layer in geoscale_layers(model)} == {"fused"}
        assert torch.equal(model(**call).logits, expected)
        assert [row["calls"] for row in geometry_report(model).rows] == [2, 2]

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients(self, checkpointing):
        gradients = []
        for make in (patch_model, named):
            model = make(tiny_model("llama")).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(**padded(), labels=tokens(2, 24)).loss.backward()
            gradients.append([p.grad for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    def test_generation(self):
        ids = tokens(2, 12)
        expected = patch_model(tiny_model("llama")).generate(ids, max_new_tokens=6, do_sample=False)
        model = named(tiny_model("llama"))
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
        assert geometry_report(model).rows[0]["calls"] == 1

    @pytest.mark.parametrize(
        "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
    )
    def test_under_contexts(self, context):
        with context():
            expected = patch_model(tiny_model("llama"))(tokens(1, 16)).logits
            assert torch.equal(named(tiny_model("llama"))(tokens(1, 16)).logits, expected)
        model = named(tiny_model("llama"))
        with context():
            model(tokens(1, 16))
        model.train()(tokens(1, 16)).logits.sum().backward()  # nothing of the context has stayed

    def test_a_mask_of_the_callers_own(self):
        """No mask is asked for: the first attention call patches, and that layer keeps to the interface."""
        mask = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
        call = {"input_ids": tokens(1, 24), "attention_mask": mask}
        sdpa = tiny_model("llama")(**call).logits
        expected = patch_model(tiny_model("llama"))(**call).logits
        model = named(tiny_model("llama")).train()
        model.gradient_checkpointing_enable()
        logits = model(**call).logits
        logits.sum().backward()
        # On a GPU the interface's layer rounds q and k before RoPE, a fused one after it.
        allowed = FUSED_RUNS if logits.is_cuda else FLIPPED_ROUNDINGS
        assert (logits - expected).norm() / expected.norm() < allowed
        assert (logits - sdpa).norm() / sdpa.norm() > 1e-3
        fronts = [row["front_end"] for row in geometry_report(model).rows]
        assert fronts[0].startswith("its first call")
        assert fronts[1] == "fused"

    def test_is_said_once(self, caplog):
        model = named(tiny_model("llama"))
        with caplog.at_level(logging.INFO, logger="hf_geoscale"):
            model(tokens(1, 8)), model(tokens(1, 8))
        said = [r for r in caplog.records if "patched in its first forward" in r.getMessage()]
        assert len(said) == 1
        assert "LlamaForCausalLM has attn_implementation='geoscale'" in said[0].getMessage()

    def test_unpatching_leaves_sdpa(self):
        model, ids = tiny_model("llama"), tokens(1, 16)
        before = model(ids).logits
        named(model)(ids)
        unpatch_model(model)
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(ids).logits, before)

    def test_unpatching_before_the_first_forward_leaves_sdpa(self):
        model = named(tiny_model("llama"))
        unpatch_model(model)
        assert model.config._attn_implementation == "sdpa"

    def test_patching_before_the_first_forward_chooses(self):
        model = patch_model(named(tiny_model("llama")), precision="high")
        model(tokens(1, 16))
        assert {layer.config.precision for layer in geoscale_layers(model)} == {"high"}
        assert unpatch_model(model).config._attn_implementation == "sdpa"


class Wrapper(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, ids):
        return self.backbone(input_ids=ids)[0]


class TestWhichModel:
    def test_the_whole_of_it(self):
        model = named(tiny_model("llama"))
        model(tokens(1, 8))
        assert {id(layer.site.model) for layer in geoscale_layers(model)} == {id(model)}

    @pytest.mark.parametrize("wrapped", [Wrapper, torch.optim.swa_utils.AveragedModel, lambda m: m.model])
    def test_inside_and_out(self, wrapped):
        model = named(tiny_model("llama"))
        wrapped(model)(tokens(1, 8))
        if wrapped is torch.optim.swa_utils.AveragedModel:
            return  # a copy ran
        assert len(patched_layers(model)) == 2

    def test_through_peft_which_calls_forward_itself(self):
        peft = pytest.importorskip("peft")
        model = named(tiny_model("llama"))
        outer = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
        outer(tokens(1, 8))
        assert {id(layer.site.model) for layer in geoscale_layers(model)} == {id(model)}
        unpatch_model(outer)
        assert outer.config._attn_implementation == model.config._attn_implementation == "sdpa"

    def test_a_model_called_inside_another_one(self):
        """An assistant in the forward of a model of its own: each is found for itself."""
        draft = named(tiny_model("llama", seed=1))

        class Target(LlamaForCausalLM):
            def forward(self, input_ids, **kwargs):
                self.drafted = draft(input_ids).logits
                return super().forward(input_ids, **kwargs)

        target = named(Target(LlamaConfig(**SHAPE)).eval())
        out = target(tokens(1, 16)).logits
        assert torch.equal(target.drafted, patch_model(tiny_model("llama", seed=1))(tokens(1, 16)).logits)
        assert len(patched_layers(target)) == len(patched_layers(draft)) == 2
        assert torch.equal(out, patch_model(target)(tokens(1, 16)).logits)

    def test_models_of_one_config(self):
        config = LlamaConfig(**SHAPE, attn_implementation="geoscale")
        first, second = LlamaModel(config).eval(), LlamaModel(config).eval()
        first(tokens(1, 8))
        assert patched_layers(first)
        assert not patched_layers(second)
        second(tokens(1, 8))
        assert len(patched_layers(second)) == 2
        unpatch_model(first)
        assert second.config._attn_implementation == "geoscale"
        second(tokens(1, 8))
        assert [row["calls"] for row in geometry_report(second).rows] == [2, 2]

    def test_copies_before_and_after(self):
        model = named(tiny_model("llama"))
        before = copy.deepcopy(model)
        expected = model(tokens(1, 8)).logits
        after = copy.deepcopy(model)
        assert torch.equal(before(tokens(1, 8)).logits, expected)
        assert torch.equal(after(tokens(1, 8)).logits, expected)

    def test_threads(self):
        call = padded()
        expected = patch_model(tiny_model("llama"))(**call).logits
        models = [named(tiny_model("llama")) for _ in range(2)]
        found: list[torch.Tensor] = []

        def run(model):
            with torch.no_grad():
                found.append(model(**call).logits)

        workers = [threading.Thread(target=run, args=(model,)) for model in models for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(found) == 8
        assert all(torch.equal(logits, expected) for logits in found)
        assert all([row["calls"] for row in geometry_report(model).rows] == [4, 4] for model in models)


class TestRefused:
    def test_an_unsupported_family(self):
        from transformers import GptOssConfig, GptOssForCausalLM

        shape = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = GptOssConfig(**shape, intermediate_size=32, num_key_value_heads=2, head_dim=16, num_local_experts=2)
        model = named(GptOssForCausalLM(config).eval())
        with pytest.raises(UnsupportedModelError, match="'gpt_oss' is not supported: attention sinks"):
            model(tokens(1, 8))
        assert unpatch_model(model).config._attn_implementation in ("sdpa", "eager")

    @pytest.mark.parametrize("how", ["function", "module", "in place"])
    def test_under_torch_compile(self, how):
        model = named(tiny_model("llama"))
        if how == "in place":
            model.compile(backend="eager")
        call = {"function": torch.compile(lambda ids: model(ids), backend="eager"), "in place": model}
        with pytest.raises(UnsupportedModelError, match=r"torch\.compile has compiled.*patch_model\(model\) before"):
            (call.get(how) or torch.compile(model, backend="eager"))(tokens(1, 8))
        assert not patched_layers(model)

    def test_under_zero_3(self):
        """What deepspeed.initialize leaves on a parameter, gathered in its module's forward."""
        model = named(tiny_model("llama"))
        model.model.layers[1].self_attn.v_proj.weight.ds_id = 7
        with pytest.raises(
            UnsupportedModelError, match=r"ZeRO-3 has partitioned.*patch_model\(model\) before accelerator.prepare"
        ):
            model(tokens(1, 8))
        assert not patched_layers(model)

    def test_a_replica_of_data_parallel(self):
        model = named(tiny_model("llama"))
        model._is_replica = True
        with pytest.raises(UnsupportedModelError, match="DataParallel cannot replicate FP8"):
            model(tokens(1, 8))

    def test_an_attention_without_a_model(self):
        attention = tiny_model("llama").model.layers[0].self_attn
        attention.config._attn_implementation = "geoscale"
        angles = tuple(torch.zeros(1, 8, 16) for _ in range(2))
        with pytest.raises(
            UnsupportedModelError, match=r"no transformers model .*call hf_geoscale.patch_model\(model\)"
        ):
            attention(torch.zeros(1, 8, 64), position_embeddings=angles, attention_mask=None)

    def test_a_layer_added_to_a_patched_model(self):
        model = named(tiny_model("llama"))
        model(tokens(1, 8))
        extra = named(tiny_model("llama")).model.layers[0]
        model.model.layers.append(extra)
        model.config.num_hidden_layers = 3
        model.config.layer_types = ["full_attention"] * 3
        with pytest.raises(
            UnsupportedModelError, match=r"added to the patched LlamaForCausalLM later.*patch_model\(model\) again"
        ):
            model(tokens(1, 8), use_cache=False)
        patch_model(model)
        model(tokens(1, 8), use_cache=False)


class TestTraining:
    def test_the_callback_chooses_the_configuration(self, tmp_path):
        model = named(tiny_model("llama"))
        config = GeoScaleConfig(precision="high")
        run = trainer(model, tmp_path, GeoScaleCallback(config=config))
        run.train()
        assert {layer.config for layer in geoscale_layers(model)} == {config}
        assert "geoscale/utilisation" in run.state.log_history[0]

    def test_without_callback(self, tmp_path):
        losses = []
        for make in (named, patch_model):
            run = trainer(make(tiny_model("llama")), tmp_path)
            run.train()
            losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        assert losses[0] == losses[1]


LOADING = """
import sys, hf_geoscale
assert not {"torch", "transformers"} & set(sys.modules)
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
folder, ids = sys.argv[1], torch.arange(3, 19)[None]
expected = hf_geoscale.patch_model(LlamaForCausalLM.from_pretrained(folder).eval())(ids).logits
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="geoscale").eval()
assert torch.equal(model(ids).logits, expected)
AutoModel.from_pretrained(folder, attn_implementation="geoscale")(ids)
config = LlamaConfig.from_pretrained(folder)
assert config._attn_implementation != "geoscale"
for built in (
    AutoModelForCausalLM.from_config(config, attn_implementation="geoscale"),
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder, attn_implementation="geoscale")),
):
    built(ids)
    assert [row["calls"] for row in hf_geoscale.geometry_report(built).rows] == [1, 1]
model.save_pretrained(folder + "/again")
again = AutoModelForCausalLM.from_pretrained(folder + "/again")
assert again.config._attn_implementation == "sdpa"
print("loaded")
"""


def test_loading_after_importing_the_package_alone(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOADING, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "loaded", done.stderr
    assert "geoscale" not in json.dumps(json.loads((tmp_path / "again" / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config._attn_implementation == "sdpa"

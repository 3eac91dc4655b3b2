"""LoRA in every state: the certificate is of what the layer computes, and scales never stay behind it."""

import copy
import inspect

import pytest
import torch
from torch import nn

from hf_geoscale import (
    UnsupportedModelError,
    geometry_report,
    patch_model,
    unpatch_model,
)
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.adapters import dropout_deviation

from ..conftest import tiny_model, tokens
from ..tolerances import OUTPUT_ERROR
from .effective import adversarial_embeddings, assert_certified, overflows, relative, true_map

peft = pytest.importorskip("peft")

from .adapters import SEPARATE, adapted, disturb, lora, lora_layers  # noqa: E402 (needs peft)


def disable(model) -> None:
    model.base_model.disable_adapter_layers()


def unmerge(model) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def activate_both(model) -> None:
    model.base_model.set_adapter(["a0", "a1"])


STATES = {
    "plain": ({}, None),
    "rslora": ({"use_rslora": True}, None),
    "dora": ({"use_dora": True}, None),
    "bias": ({"lora_bias": True}, None),
    "switched": ({"adapters": 2}, lambda m: m.set_adapter("a1")),
    "two active": ({"adapters": 2}, activate_both),
    "two dora active": ({"adapters": 2, "use_dora": True}, activate_both),
    "disabled": ({}, disable),
    "merged": ({}, lambda m: m.merge_adapter()),
    "merged and disabled": ({}, lambda m: (m.merge_adapter(), disable(m), m(tokens(1, 4)))),
    "dora merged": ({"use_dora": True}, lambda m: m.merge_adapter()),
    "unmerged": ({}, unmerge),
    "scaled": ({}, lambda m: [layer.scale_layer(-3.0) for layer in lora_layers(m)]),
}
FEATURES = {"rslora": "rsLoRA", "dora": "DoRA", "dora merged": "DoRA", "two dora active": "DoRA"}


def state_parameters() -> list:
    found = []
    for family in ("llama", "llama-bias-yarn", "gpt2"):
        for name, (options, change) in STATES.items():
            if name == "bias" and family == "llama":
                continue  # its projections have none to merge into
            mark = pytest.mark.feature(FEATURES.get(name, "LoRA"))
            found.append(pytest.param(family, options, change, id=f"{family}-{name}", marks=mark))
    return found


@pytest.mark.parametrize(("family", "options", "change"), state_parameters())
def test_every_state_is_certified(family, options, change):
    model = adapted(family, **options)
    if change is not None:
        change(model)
    ids = tokens(2, 24)
    with torch.no_grad():
        exact = model(ids).logits
        assert patch_model(model) is model
        assert relative(model(ids).logits, exact) < OUTPUT_ERROR
        assert_certified(model)
        embeddings = adversarial_embeddings(model)
        model(inputs_embeds=embeddings)
        assert overflows(model) == 0
        assert 0.3 < geometry_report(model).rows[0]["utilisation"] <= 1
        unpatch_model(model)
        torch.testing.assert_close(model(ids).logits, exact, rtol=0, atol=0)


@pytest.mark.feature("LoRA")
@pytest.mark.parametrize("change", [name for name, (_, change) in STATES.items() if change is not None])
def test_a_forward_after_a_change_of_state_uses_new_scales(change):
    options, act = STATES[change]
    model, ids = patch_model(adapted("llama", **options)), tokens(1, 12)
    model(ids)
    before = [layer.weights_version for layer in geoscale_layers(model)]
    act(model)
    model(ids)
    assert all(layer.weights_version != old for layer, old in zip(geoscale_layers(model), before, strict=True))
    assert_certified(model)


@pytest.mark.feature("DPO reference (disable_adapter)")
def test_the_reference_of_dpo_has_scales_of_its_own():
    """The adapter grows the weights tenfold; the reference without it is measured without it, and back again."""
    model, ids = adapted("llama", lora_alpha=100), tokens(1, 12)
    patch_model(model)
    model(ids)
    bound = geoscale_layers(model)[0].geometry.q_bound.clone()
    with model.disable_adapter(), torch.no_grad():
        exact = unpatch_model(copy.deepcopy(model))(ids).logits
        assert relative(model(ids).logits, exact) < OUTPUT_ERROR
        assert (geoscale_layers(model)[0].geometry.q_bound < bound / 5).all()
        assert_certified(model)
    model(ids)
    torch.testing.assert_close(geoscale_layers(model)[0].geometry.q_bound, bound)
    assert overflows(model) == 0


@pytest.mark.feature("LoRA dropout")
@pytest.mark.parametrize("p", [0.1, 0.6, 0.95])
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_is_covered_in_training_and_only_there(family, kind, p):
    model = patch_model(adapted(family, lora_dropout=p, **kind))
    layer = geoscale_layers(model)[0]
    calm = layer.geometry.q_bound.clone()
    assert_certified(model)
    model.train()
    layer.refresh_if_stale()
    noisy = layer.geometry.q_bound
    assert (noisy > calm).all()
    attention, block = layer.site.attention, layer.site.block
    dim, width = attention.head_dim, attention.config.hidden_size
    module, norm = (attention.c_attn, block.ln_1) if family == "gpt2" else (attention.q_proj, block.input_layernorm)
    reached = torch.zeros(4)
    for seed in range(60):  # masks; the worst tokens of the map that each mask leaves
        twin = copy.deepcopy(module).double()
        torch.manual_seed(seed)
        mask = torch.empty(width).bernoulli_(1 - p).double() / (1 - p)
        for dropout in twin.lora_dropout.values():
            dropout.forward = lambda x, mask=mask: x * mask
        with torch.no_grad():
            offset = twin(torch.zeros(1, width, dtype=torch.float64))[0, :width]
            weight = twin(torch.eye(width, dtype=torch.float64))[:, :width].T - offset[:, None]
        shift = torch.zeros(width) if getattr(norm, "bias", None) is None else norm.bias.detach()
        matrix = (weight * norm.weight.detach()).view(4, dim, width)
        offset = (offset + weight @ shift.double()).view(4, dim)
        sigma = torch.linalg.matrix_norm(matrix, 2)
        right = torch.linalg.svd(matrix, full_matrices=False)[2][:, 0]
        worst = (matrix @ right[..., None]).squeeze(-1) * width**0.5
        ends = torch.stack([(worst + offset).norm(dim=-1), (worst - offset).norm(dim=-1)]).amax(0)
        assert (sigma * width**0.5 <= noisy).all()
        reached = torch.maximum(reached, ends.float())
    assert (reached <= noisy).all()
    if p > 0.9:
        assert (reached > calm).any()  # the term is needed
    ids = tokens(2, 30)
    model(ids, labels=ids).loss.backward()
    assert overflows(model) == 0


def test_dropout_deviation():
    for p, expected in ((0.0, 0.0), (0.2, 1.0), (0.5, 1.0), (0.75, 3.0), (1.0, 1.0)):
        dropout = nn.Dropout(p)
        assert dropout_deviation(dropout) == pytest.approx(expected)
        mask = dropout(torch.ones(10_000))
        assert float((mask - 1).abs().amax()) <= dropout_deviation(dropout) + 1e-6
        assert dropout_deviation(dropout.eval()) == 0.0
    assert dropout_deviation(nn.Identity()) == 0.0


@pytest.mark.feature("modules_to_save")
@pytest.mark.parametrize("state", ["active", "disabled", "other adapter"])
def test_modules_to_save_around_a_projection_and_the_norm(state):
    config = lora(modules_to_save=["input_layernorm", "v_proj"])
    config.target_modules = {"q_proj", "k_proj"}
    model = peft.get_peft_model(tiny_model("llama"), config, adapter_name="a0")
    other = lora()
    other.target_modules = {"q_proj", "k_proj"}
    model.add_adapter("a1", other)
    disturb(model, 0.3)
    model.eval()
    patch_model(model)
    before = geoscale_layers(model)[0].geometry.v_bound.clone()
    block, x = model.base_model.model.model.layers[0], torch.randn(1, 4, 64)
    value = block.self_attn.v_proj(block.input_layernorm(x))
    if state == "disabled":
        disable(model)
    elif state == "other adapter":
        model.base_model.set_adapter("a1")
    ids = tokens(1, 20)
    with torch.no_grad():
        exact = unpatch_model(copy.deepcopy(model))(ids).logits
        assert relative(model(ids).logits, exact) < OUTPUT_ERROR
    same = torch.equal(block.self_attn.v_proj(block.input_layernorm(x)), value)
    assert (
        same == (state == "active") or state == "other adapter"
    )  # which leaves PEFT 0.17's modules_to_save as they were
    assert torch.equal(geoscale_layers(model)[0].geometry.v_bound, before) == same
    assert_certified(model)


@pytest.mark.feature("LoRA")
def test_base_and_adapter_that_cancel():
    """W = −s·BA leaves nothing but the roundings of both, in BF16; the certificate covers them."""
    model = adapted("llama", lora_alpha=4).to(torch.bfloat16)
    attention = model.base_model.model.model.layers[0].self_attn
    with torch.no_grad():
        for name in SEPARATE:
            module = getattr(attention, name)
            module.base_layer.weight.copy_(-(module.lora_B["a0"].weight.float() @ module.lora_A["a0"].weight.float()))
    patch_model(model)
    torch.manual_seed(0)
    with torch.no_grad():
        model(inputs_embeds=torch.randn(1, 200, 64).bfloat16())
    row = geometry_report(model).rows[0]
    assert row["overflows"] == 0
    assert row["utilisation"] <= 1
    query = geoscale_layers(model)[0].site.projections()[0]
    spectral = 8 * torch.linalg.matrix_norm(query.matrix(), 2)
    assert max(row["q_amax"]) > 0.05 * float(spectral.amax())


class TestWrapping:
    @pytest.mark.feature("LoRA")
    def test_wrapped_after_patching(self):
        ids = tokens(1, 16)
        model = patch_model(tiny_model("llama"))
        wrapped = peft.get_peft_model(model, lora(), adapter_name="a0")
        disturb(wrapped)
        exact = unpatch_model(copy.deepcopy(wrapped)).eval()(ids).logits
        assert relative(wrapped.eval()(ids).logits, exact) < OUTPUT_ERROR
        assert_certified(wrapped)
        assert geometry_report(wrapped).rows[0]["calls"] == 1
        merged = wrapped.merge_and_unload()
        assert merged is model
        merged(ids)
        assert_certified(merged)
        assert overflows(merged) == 0

    @pytest.mark.feature("LoRA")
    def test_patching_a_peft_model_leaves_other_models_alone(self):
        base = tiny_model("llama")
        other = type(base)(base.config)
        model = patch_model(peft.get_peft_model(base, lora()))
        assert other.config._attn_implementation == "sdpa"
        assert model.get_base_model().config._attn_implementation == "geoscale"
        assert model.config is model.get_base_model().config
        assert patch_model(model) is model
        assert unpatch_model(model) is model
        assert model.get_base_model().config._attn_implementation == "sdpa"

    @pytest.mark.feature("LoRA")
    def test_only_adapters_enter_a_checkpoint(self, tmp_path):
        model = patch_model(adapted("llama"))
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "a0").eval()
        ids = tokens(1, 16)
        torch.testing.assert_close(loaded(ids).logits, unpatch_model(model)(ids).logits, rtol=0, atol=0)

    def test_a_peft_model_of_something_else(self):
        inner = nn.Sequential(nn.Linear(4, 4))
        model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["0"]))
        with pytest.raises(TypeError, match="PEFT model or a transformers PreTrainedModel, got PeftModel"):
            patch_model(model)


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "name"),
        [
            (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "Linear adapter"),
            (lambda: peft.VeraConfig(target_modules=["q_proj"], r=4), "Linear adapter"),
            (lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "SVDLinear adapter"),
            (lambda: peft.LoHaConfig(target_modules=["v_proj"]), "Linear adapter"),
        ],
        ids=["ia3", "vera", "adalora", "loha"],
    )
    @pytest.mark.feature("other PEFT adapters", refused=True)
    def test_other_adapters_are_refused_by_name(self, config, name):
        with pytest.raises(UnsupportedModelError, match=rf"is a .*{name}.*merge_and_unload"):
            patch_model(peft.get_peft_model(tiny_model("llama"), config()))

    @pytest.mark.feature("other PEFT adapters", refused=True)
    def test_other_variants_of_lora(self):
        if "alora_invocation_tokens" not in inspect.signature(peft.LoraConfig).parameters:
            pytest.skip(f"PEFT {peft.__version__} has no activated LoRA")
        model = adapted("llama", alora_invocation_tokens=[5])
        with pytest.raises(UnsupportedModelError, match="active ALoraLinearVariant"):
            patch_model(model)
        disable(model)
        patch_model(model)  # nothing of it runs

    @pytest.mark.feature("several adapters in one batch", refused=True)
    def test_several_adapters_in_one_batch(self):
        model, ids = patch_model(adapted("llama", adapters=2)), tokens(2, 10)
        with torch.no_grad():
            model(ids)
            with pytest.raises(UnsupportedModelError, match="several adapters in one batch"):
                model(ids, adapter_names=["a0", "a1"])


def test_true_map_is_not_the_stored_weight():
    """The oracle of this file reads the forward, not `.weight`, which is the base's alone."""
    model = adapted("llama")
    module = model.base_model.model.model.layers[0].self_attn.q_proj
    weight, _ = true_map(module, 64)
    assert relative(module.weight.double(), weight) > 0.1

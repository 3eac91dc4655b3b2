"""The norms that Qwen3 puts on queries and keys: the kernels take them over where nobody stands around them."""

import functools
import types

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm

from hf_geoscale import fp8_attention, geometry_report, patch_model
from hf_geoscale.integrations.fingerprints import fingerprint

from ..conftest import tiny_model, tokens
from ..kernels.fused_cases import DEVICE
from ..tolerances import FLIPPED_ROUNDINGS, FUSED_ERROR
from .compare import relative
from .test_decoders import tiny
from .test_front_end import attention_of, norms_of, step

pytestmark = pytest.mark.feature("fused front end")


@pytest.fixture
def given_norms(monkeypatch) -> list[bool]:
    """Whether each call of FP8 attention got norms."""
    calls: list[bool] = []

    def spy(*operands, **options):
        calls.append(options["qk_norm"] is not None)
        return fp8_attention(*operands, **options)

    monkeypatch.setattr("hf_geoscale.integrations.attention.fp8_attention", spy)
    return calls


def test_are_taken_over(given_norms):
    patch_model(tiny_model("qwen3"))(tokens(1, 20), use_cache=False)
    assert given_norms == [True, True]


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_a_hook_keeps_them_outside_and_runs(given_norms, name, kind):
    model, seen = patch_model(tiny_model("qwen3")), []
    norm = getattr(attention_of(model), name)

    def record(*_):
        seen.append(1)

    handle = getattr(norm, f"register_{kind}_hook")(record)
    model(tokens(1, 20), use_cache=False).logits.sum().backward()
    assert (given_norms, seen) == ([False, True], [1])
    handle.remove()
    model(tokens(1, 20), use_cache=False)
    assert given_norms[2:] == [True, True]


def test_a_hook_on_all_modules_keeps_them_outside_and_runs(given_norms):
    model, seen = patch_model(tiny_model("qwen3")), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    model(tokens(1, 20), use_cache=False)
    handle.remove()
    assert given_norms == [False, False]
    assert seen.count("Qwen3RMSNorm") == 2 * 4 + 1


@pytest.mark.parametrize("change", ["instance", "class", "subclass", "gemma", "shard", "another epsilon", "no epsilon"])
def test_other_norms_stay_outside(monkeypatch, given_norms, change):
    """Their own forward decides, whatever it does."""
    model, ids = tiny_model("qwen3"), tokens(1, 20)
    norms, original = norms_of(model), Qwen3RMSNorm.forward

    def other(self, hidden_states):
        return original(self, hidden_states) + 0

    if change == "class":
        monkeypatch.setattr(Qwen3RMSNorm, "forward", other)
    for norm in norms:
        if change == "instance":
            norm.forward = types.MethodType(other, norm)
        elif change == "subclass":
            norm.__class__ = type("OtherRMSNorm", (Qwen3RMSNorm,), {"forward": other})
        elif change == "gemma":  # multiplies by 1 + weight
            norm.__class__, norm.eps = Gemma2RMSNorm, norm.variance_epsilon
        elif change == "shard":
            norm.weight = type("Shard", (torch.nn.Parameter,), {})(norm.weight.detach())
    if change == "another epsilon":
        norms[0].variance_epsilon = norms[2].variance_epsilon = 0.3
    elif change == "no epsilon":
        for norm in norms:
            norm.variance_epsilon = 0.0
    interface = patch_model(model, backend="reference", fused_front_end=False)(ids).logits
    fused = patch_model(model, backend="reference")(ids, use_cache=False).logits
    assert given_norms[2:] == [False, False]
    assert [row["front_end_calls"] for row in geometry_report(model).rows] == [1, 1]
    assert relative(fused, interface) < FLIPPED_ROUNDINGS


def test_modules_to_save_stay_outside_and_train(given_norms):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["q_norm"])
    model = peft.get_peft_model(tiny_model("qwen3"), config)
    step(patch_model(model, backend="reference"), tokens(1, 20))
    assert given_norms == [False, False]
    trained = [n for n, p in model.named_parameters() if p.grad is not None and "norm" in n]
    assert len(trained) == 2
    assert all("q_norm" in name for name in trained)


@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=pytest.mark.gpu)])
def test_lora_beside_frozen_norms(backend):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model, ids = peft.get_peft_model(tiny_model("qwen3"), config).to(DEVICE), tokens(1, 20).to(DEVICE)
    results = [step(patch_model(model, backend=backend, fused_front_end=fused), ids) for fused in (False, True)]
    allowed = FLIPPED_ROUNDINGS if backend == "reference" else FUSED_ERROR
    assert relative(results[1][0], results[0][0]) < allowed
    assert relative(results[1][1], results[0][1]) < 4 * allowed
    assert all(norm.weight.grad is None for norm in norms_of(model))


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 projections", "autocast"])
def test_float32_weights_over_bfloat16(autocast):
    """Without autocast, transformers' own forward gives float32 queries, which o_proj then refuses."""
    model, ids = tiny_model("qwen3"), tokens(1, 20)
    interface = patch_model(model, backend="reference", fused_front_end=False)(ids).logits
    patch_model(model, backend="reference")
    if not autocast:
        model.bfloat16()
        for norm in norms_of(model):
            norm.float()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        logits, grads = step(model, ids)
    assert relative(logits, interface) < FUSED_ERROR
    assert all(norm.weight.grad.dtype == torch.float32 and norm.weight.grad.any() for norm in norms_of(model))
    assert torch.isfinite(grads).all()


@pytest.mark.parametrize("name", ["Qwen3Moe", "Dots1", "Mellum"])
def test_classes_under_other_names_have_the_same_code(name):
    module = {"Qwen3Moe": "qwen3_moe"}.get(name, name.lower())
    theirs = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    for own, other in (
        (Qwen3Attention.forward, getattr(theirs, f"{name}Attention").forward),
        (Qwen3RMSNorm.forward, getattr(theirs, f"{name}RMSNorm").forward),
        (modeling_qwen3.apply_rotary_pos_emb, theirs.apply_rotary_pos_emb),
        (modeling_qwen3.rotate_half, theirs.rotate_half),
    ):
        assert fingerprint(own).digests == fingerprint(other).digests


@pytest.mark.parametrize("family", ["qwen3_moe", "dots1", "mellum"])
def test_they_give_what_their_own_forward_gives(given_norms, family):
    pytest.importorskip(f"transformers.models.{family}")
    model = patch_model(tiny(family).train(), backend="reference")
    attention = attention_of(model)
    attention.sliding_window = 9
    hidden = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer_type = {"layer_type": attention.config.layer_types[0]} if family == "mellum" else {}
    angles = model.model.rotary_emb(hidden, torch.arange(20)[None], **layer_type)
    results = []
    for forward in (attention, functools.partial(type(attention).forward, attention)):
        out, _ = forward(hidden, position_embeddings=angles, attention_mask=None)
        parameters = [hidden, *attention.parameters()]
        grads = torch.autograd.grad(out.square().sum(), parameters)
        results.append((out, torch.cat([grad.flatten() for grad in grads])))
    assert given_norms == [True, False]
    assert relative(results[0][0], results[1][0]) < FLIPPED_ROUNDINGS
    assert relative(results[0][1], results[1][1]) < 4 * FLIPPED_ROUNDINGS

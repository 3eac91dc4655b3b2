"""What a fragility probe leaves behind, which settings and precisions it honours, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from hf_geoscale import UnsupportedModelError, fragility_report, patch_model, unpatch_model
from hf_geoscale.integrations.fragility import FragilityProbe
from hf_geoscale.integrations.fragility_blocks import FIXED_EPSILON, norm_epsilon
from hf_geoscale.integrations.fragility_contexts import ieee_float32

from ..conftest import tiny_model, tokens
from .releases import built

LENGTH = 24


def snapshot(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    return hooks, modes, model.config._attn_implementation, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "geoscale"])
def test_nothing_of_the_model_changes(implementation):
    model, ids = tiny_model("llama"), tokens(2, LENGTH)
    if implementation == "geoscale":
        patch_model(model)
    else:
        model.set_attn_implementation(implementation)
    model.train()
    model.model.layers[1].mlp.eval()
    with torch.no_grad():
        logits = model(ids).logits
    before, state = snapshot(model), torch.get_rng_state()
    calls = model.model.layers[0].self_attn.geoscale.calls if implementation == "geoscale" else 0
    fragility_report(model, ids)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    if implementation == "geoscale":
        assert model.model.layers[0].self_attn.geoscale.calls == calls
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert all(p.grad is None for p in model.parameters())


BACKEND = torch.backends.cuda.matmul
TF32 = {
    "the default": lambda: None,
    "allow_tf32": lambda: setattr(BACKEND, "allow_tf32", True),
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "fp32_precision": lambda: setattr(BACKEND, "fp32_precision", "tf32"),
}


@pytest.mark.skipif(not hasattr(BACKEND, "fp32_precision"), reason="torch before 2.9 has one interface")
@pytest.mark.parametrize("how", TF32)
def test_the_setting_of_tf32_comes_back(how):
    torch.set_float32_matmul_precision("highest")
    default = BACKEND.fp32_precision
    TF32[how]()
    before = BACKEND.fp32_precision
    assert (before == "tf32") == (how != "the default")
    try:
        with ieee_float32():
            assert BACKEND.fp32_precision == "ieee"
            assert not BACKEND.allow_tf32
        assert BACKEND.fp32_precision == before
        if how != "fp32_precision":
            assert torch.get_float32_matmul_precision() == ("highest" if how == "the default" else "high")
    finally:
        BACKEND.fp32_precision = default
        torch.set_float32_matmul_precision("highest")


def test_an_error_leaves_nothing_behind(monkeypatch):
    model, ids = tiny_model("gpt2"), tokens(1, LENGTH)
    before = snapshot(model)
    monkeypatch.setattr(model.transformer.ln_f, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fragility_report(model, ids)
    assert snapshot(model) == before


def test_a_patched_model_has_the_report_of_its_unpatched_self_and_its_certificate():
    model, ids = tiny_model("qwen3"), tokens(2, LENGTH)
    plain = fragility_report(model, ids).rows
    patched = fragility_report(patch_model(model), ids).rows
    for one, other in zip(plain, patched, strict=True):
        assert one.pop("logit_bound") is None
        assert other.pop("logit_bound") > 0
        assert one == other
    unpatch_model(model)


def test_a_diverged_model_is_reported_and_a_reloaded_one_measured_afresh():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe = FragilityProbe(model)
    before = probe.report(ids)
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.fill_(torch.nan)
    diverged = probe.report(ids)
    assert math.isnan(diverged.predicted)
    assert "nan" in diverged.to_markdown()
    model.load_state_dict(state)
    assert probe.report(ids).predicted == pytest.approx(before.predicted, rel=1e-6)


def test_bfloat16_models_are_measured_in_float32():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    exact = fragility_report(model, ids)
    rounded = fragility_report(model.bfloat16(), ids)
    assert rounded.predicted == pytest.approx(exact.predicted, rel=0.05)
    assert rounded.predicted != exact.predicted


def test_a_second_report_of_the_same_probe_continues_its_iteration():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    probe = FragilityProbe(model, v1=False)
    first, second = probe.report(ids).rows, probe.report(ids).rows
    for one, other in zip(first, second, strict=True):
        assert one["output_sigma"] <= other["output_sigma"] * (1 + 1e-9)
        assert one["d_smx"] == other["d_smx"]


def test_a_block_without_its_mlp_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"layer 0 of the dbrx model: the block .* holds no MLP"):
        fragility_report(built("dbrx"), tokens(1, LENGTH))


def test_what_is_refused(monkeypatch):
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'fp8'"):
        fragility_report(model, ids, "fp8")
    with pytest.raises(ValueError, match="norms must be 'exact' or 'sampled', got 'all'"):
        fragility_report(model, ids, norms="all")
    with pytest.raises(TypeError, match=r"batch must be input ids .* got list; pass tokenizer"):
        fragility_report(model, [1, 2])
    with pytest.raises(ValueError, match=r"tokens in the shape \(B, L\), got \(3,\)"):
        fragility_report(model, torch.tensor([3, 4, 5]))
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(UnsupportedModelError, match=r"layer 1 .* never reached transformers' attention interface"):
        fragility_report(model, ids)
    renamed = tiny_model("llama")
    renamed.model.layers[0].self_attn.o_projection = nn.Linear(64, 64)
    del renamed.model.layers[0].self_attn.o_proj
    with pytest.raises(UnsupportedModelError, match=r"layer 0 .* no output projection called o_proj, out_proj"):
        fragility_report(renamed, ids)


@pytest.mark.gpu
def test_a_gpu_reports_what_the_cpu_does():
    model, ids = tiny_model("llama").cpu(), tokens(2, LENGTH).cpu()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        there = fragility_report(patch_model(model.cuda()), ids, "float8_e4m3")
    finally:
        torch.set_float32_matmul_precision(before)
    here = fragility_report(unpatch_model(model).cpu(), ids, "float8_e4m3")
    for one, other in zip(there.rows, here.rows, strict=True):
        for name in (
            "kappa_softmax",
            "chi_score",
            "attention_magnitude",
            "norm_magnitude",
            "remainder_magnitude",
            "risk",
        ):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
    assert there.predicted_v1 == pytest.approx(here.predicted_v1, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_epsilon_of_torchs_rms_norm_is_the_one_it_computes_with(dtype):
    norm = nn.RMSNorm(8, eps=None, dtype=dtype)
    x = torch.full((1, 8), 1e-4, dtype=dtype)
    square = x.double()[0, 0].square()
    inside = square / norm(x).double()[0, 0].square() - square  # y = x/√(x² + ε)
    assert float(inside) == pytest.approx(norm_epsilon(norm), rel=0.02)  # BF16's output is rounded to 2⁻⁸
    assert norm_epsilon(nn.RMSNorm(8, eps=3e-4)) == 3e-4
    assert norm_epsilon(nn.Module()) == FIXED_EPSILON

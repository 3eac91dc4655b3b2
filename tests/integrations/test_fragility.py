"""`fragility_report` against the same quantities from whole matrices in float64, and what it leaves behind."""

import math

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.families import tiny
from hf_geoscale import UnsupportedModelError, fragility_report, patch_model, unpatch_model
from hf_geoscale.integrations.fragility import FragilityProbe
from hf_geoscale.integrations.fragility_contexts import ieee_float32

from ..conftest import tiny_model, tokens
from ..tolerances import FRAGILITY_FLOAT32

LENGTH = 24
POWER_ITERATION = 0.05
"""24 rounds from a random start reach at least 0.95 σ of these random weights (geometry.COLD_ROUNDS)."""


def operands(model, family: str, layer: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the layer's branches see and give, in the model's own modules: the norms' inputs, PV, act, both branches, q and k."""
    if family == "gpt2":
        block = model.transformer.h[layer]
        h = block.ln_1(x)
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in block.attn.c_attn(h).split(64, dim=-1))
        out, norms = block.attn.c_proj, (block.ln_1, block.ln_2)
    else:
        block = model.model.layers[layer]
        h = block.input_layernorm(x)
        a = block.self_attn
        q, k, v = (p(h).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, torch.arange(x.shape[1])[None]))
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        out, norms = a.o_proj, (block.input_layernorm, block.post_attention_layernorm)
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    scores = q @ k.mT / 4
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    attended = (p @ v).transpose(1, 2).flatten(2)
    attention = out(attended)
    h2 = norms[1](x + attention)
    if family == "gpt2":
        activation, last = block.mlp.act(block.mlp.c_fc(h2)), block.mlp.c_proj
        first = [block.mlp.c_fc.weight.T]
        weights = {"output": out.weight.T, "last": last.weight.T}
    else:
        activation = block.mlp.act_fn(block.mlp.gate_proj(h2)) * block.mlp.up_proj(h2)
        last, first = block.mlp.down_proj, [block.mlp.gate_proj.weight, block.mlp.up_proj.weight]
        weights = {"output": out.weight, "last": last.weight}
    weights["first"] = torch.cat(first)
    found = {"attended": attended, "attention": attention, "h2": h2, "activation": activation, "mlp": last(activation)}
    found |= {"q": q, "k": k, "v": v, "p": p, "scores": scores.masked_fill(hidden, 0), "x": x, "x2": x + attention}
    return found | {f"w_{name}": w for name, w in weights.items()} | {"gains": [n.weight for n in norms]}


def norm_magnitude(x, gain, epsilon: float, centred: bool):
    spread = x.var(-1, correction=0) if centred else x.square().mean(-1)
    return gain.abs().amax() * ((epsilon + 2 * spread) / (spread + epsilon) ** 1.5 * x.norm(dim=-1)).norm()


def condition(weight):
    sigma = torch.linalg.svdvals(weight)
    return sigma[0] / (sigma[-1] + 1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_report_is_that_of_dense_algebra(family):
    model, ids = tiny_model(family), tokens(2, LENGTH)
    report = fragility_report(model, ids, "float16")
    model = model.double()
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    epsilon = model.config.layer_norm_epsilon if family == "gpt2" else model.config.rms_norm_eps
    final = None
    for layer, row in enumerate(report.rows):
        o = operands(model, family, layer, states[layer])
        final = o["x2"] + o["mlp"]
        sigma = {name: torch.linalg.matrix_norm(o[f"w_{name}"], ord=2) for name in ("output", "first", "last")}
        exact = {
            "kappa_softmax": o["scores"].norm() / o["p"].norm() * row["d_smx"],
            "chi_score": o["q"].norm() * o["k"].norm() / 4 / o["p"].norm() * row["d_smx"],
            "attention_gain": o["attention"].norm() / o["x"].norm(),
            "mlp_gain": o["mlp"].norm() / o["x2"].norm(),
            "norm_magnitude": sum(
                norm_magnitude(x, g, epsilon, family == "gpt2")
                for x, g in zip((o["x"], o["x2"]), o["gains"], strict=True)
            ),
            "kappa_eff": sum(map(condition, (o["w_output"], o["w_first"], o["w_last"]))),
        }
        for name, value in exact.items():
            assert row[name] == pytest.approx(float(value), rel=FRAGILITY_FLOAT32), name
        remainder = sigma["output"] * o["attended"].norm() + sigma["first"] * o["h2"].norm()
        remainder += sigma["last"] * o["activation"].norm()
        assert 1 - POWER_ITERATION < row["remainder_magnitude"] / float(remainder) < 1 + FRAGILITY_FLOAT32
        assert 1 - POWER_ITERATION < row["output_sigma"] / float(sigma["output"]) < 1 + FRAGILITY_FLOAT32
        magnitude = (exact["kappa_softmax"] + exact["chi_score"]) * o["p"].norm()
        magnitude *= torch.linalg.matrix_norm(o["v"], ord=2).amax()
        assert row["attention_magnitude"] == pytest.approx(float(magnitude), rel=0.02)  # geometry.sigma_upper
    assert report.final_norm == pytest.approx(float(final.norm()), rel=FRAGILITY_FLOAT32)
    local = [r["attention_magnitude"] + r["norm_magnitude"] + r["remainder_magnitude"] for r in report.rows]
    rho = (1 + report.rows[1]["attention_gain"]) * (1 + report.rows[1]["mlp_gain"])
    predicted = 2**-11 * (local[0] * rho + local[1]) / report.final_norm
    assert report.predicted == pytest.approx(predicted)
    assert report.predicted_v1 > 0
    assert report.tokens == 2 * LENGTH


def test_the_norm_conditions_are_of_the_input_statistics():
    model, ids = tiny_model("gpt2"), tokens(1, LENGTH)
    row = fragility_report(model, ids, "float16").rows[0]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[0]
        variance = states.double().var(-1, correction=0).median()
    ratio = float(variance) / model.config.layer_norm_epsilon
    assert row["rho_norm"] == pytest.approx(ratio * 64 * 2**-11, rel=FRAGILITY_FLOAT32)
    assert row["c_norm"] >= ratio**0.5 + ratio + 1


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


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    model, ids = tiny_model("llama"), tokens(1, 16)
    padding = torch.zeros(1, 8, dtype=ids.dtype)
    parts = [padding, ids] if side == "left" else [ids, padding]
    mask = torch.cat([torch.ones_like(p) if p is ids else p for p in parts], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    alone = fragility_report(model, ids, v1=False, norms="exact")
    padded = fragility_report(
        model, {"input_ids": torch.cat(parts, 1), "attention_mask": mask, "position_ids": positions}, v1=False
    )
    assert padded.tokens == 16
    for one, other in zip(alone.rows, padded.rows, strict=True):
        for name in ("score_norm", "probability_norm", "entropy", "norm_magnitude", "remainder_magnitude", "mlp_gain"):
            assert other[name] == pytest.approx(one[name], rel=FRAGILITY_FLOAT32), name
        assert 0 < other["d_smx"] <= 0.5


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "opt", "gpt_neox", "phi3", "mixtral", "granite", "starcoder2"])
def test_other_layouts(family):
    """Norm layers that end a branch, fc1 and fc2 in the block, parallel branches, fused weights, experts, a multiplier."""
    model, ids = tiny(family), tokens(2, LENGTH)
    report = fragility_report(model, ids)
    assert len(report.rows) == 2
    assert {row["mlp"] for row in report.rows} == {"unread" if family == "mixtral" else "dense"}
    assert (report.predicted_v1 is None) == (family == "mixtral")
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    row = report.rows[0]
    numbers = [value for value in row.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
    moved = float((states[1] - states[0]).norm() / states[0].norm())  # ‖attention + MLP‖/‖x‖ ≤ ρ
    assert row["attention_gain"] * 0.05 < moved <= row["transport"] * (1 + FRAGILITY_FLOAT32)


def test_gains_count_the_norms_that_end_branches_and_the_multiplier():
    model, ids = tiny("gemma2"), tokens(1, LENGTH)
    before = fragility_report(model, ids, v1=False).rows[0]["mlp_gain"]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_feedforward_layernorm.weight.copy_(
                2 * layer.post_feedforward_layernorm.weight + 1
            )  # 1 + w doubles
    assert fragility_report(model, ids, v1=False).rows[0]["mlp_gain"] == pytest.approx(2 * before, rel=1e-5)
    model = tiny("granite")
    before = fragility_report(model, ids, v1=False).rows[0]["attention_gain"]
    model.model.layers[0].residual_multiplier *= 3
    assert fragility_report(model, ids, v1=False).rows[0]["attention_gain"] == pytest.approx(3 * before, rel=1e-5)


def test_one_measurement_serves_every_precision():
    model, ids = tiny_model("gpt2"), tokens(1, LENGTH)
    eight = fragility_report(model, ids, "float8_e4m3")
    again = fragility_report(model, ids, "float16").at("float8_e4m3")
    assert again.rest == "bfloat16"
    assert again.predicted == pytest.approx(eight.predicted, rel=1e-12)
    assert again.predicted_v1 == pytest.approx(eight.predicted_v1, rel=1e-12)
    for one, other in zip(again.rows, eight.rows, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name
    assert again.at("float32").predicted == pytest.approx(eight.at("bfloat16").predicted * 2**-16, rel=1e-12)
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'fp4'"):
        eight.at("fp4")


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


def test_adapters_are_resolved():
    peft = pytest.importorskip("peft")
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    plain = fragility_report(model, ids).rows
    targets = ["o_proj", "down_proj", "gate_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    adapted = fragility_report(model.eval(), ids).rows
    merged = fragility_report(model.merge_and_unload(), ids).rows
    for one, other, before in zip(adapted, merged, plain, strict=True):
        for name in ("output_sigma", "remainder_magnitude", "kappa_eff", "risk"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
        assert one["output_sigma"] != pytest.approx(before["output_sigma"], rel=1e-2)


def test_weights_are_read_as_out_by_in():
    gpt2, llama = FragilityProbe(tiny_model("gpt2")).blocks[0], FragilityProbe(tiny_model("llama")).blocks[1]
    assert gpt2.weight(gpt2.mlp_inputs[0], "c_fc").shape == (256, 64)  # a Conv1D stores (64, 256)
    assert [llama.weight(m, "MLP").shape for m in (*llama.mlp_inputs, llama.mlp_output)] == [
        (96, 64),
        (96, 64),
        (64, 96),
    ]


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
    with pytest.raises(UnsupportedModelError, match=r"layer 0 of the dbrx model: the block .* holds no MLP"):
        fragility_report(tiny("dbrx"), ids)
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(UnsupportedModelError, match=r"layer 1 .* never reached transformers' attention interface"):
        fragility_report(model, ids)
    renamed = tiny_model("llama")
    renamed.model.layers[0].self_attn.o_projection = nn.Linear(64, 64)
    del renamed.model.layers[0].self_attn.o_proj
    with pytest.raises(UnsupportedModelError, match=r"layer 0 .* no output projection called o_proj, out_proj"):
        fragility_report(renamed, ids)


def test_the_statistics_of_a_pass_through_attention_are_its_own(monkeypatch):
    """The q, k and v it sees are those after RoPE that SDPA gets."""
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    seen = []

    def spy(module, query, key, value, mask, **options):
        seen.append(float(query.norm() * key.norm()))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("fragility_spy", spy)
    report = fragility_report(model, ids, v1=False)
    model.set_attn_implementation("fragility_spy")
    with torch.no_grad():
        model(ids)
    for norm, row in zip(seen, report.rows, strict=True):
        chi = 16**-0.5 * norm * 2**0.5 / row["probability_norm"] * row["d_smx"]  # two query heads a key head
        assert row["chi_score"] == pytest.approx(chi, rel=FRAGILITY_FLOAT32)


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

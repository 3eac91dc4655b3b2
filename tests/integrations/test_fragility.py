"""`fragility_report` against the same quantities from whole matrices in float64."""

import math

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.families import tiny
from hf_geoscale import fragility_report
from hf_geoscale.integrations.fragility import FragilityProbe

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

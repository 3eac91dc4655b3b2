"""FP8 logits and the rivals' scales in whole models: what overflows, what never does."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_geoscale import GeoScaleConfig, UnsupportedModelError, geometry_report, patch_model
from hf_geoscale.config import AutoAlpha, Delayed
from hf_geoscale.integrations import geoscale_layers, load_scaling_state_dict, scaling_state_dict
from hf_geoscale.integrations.front_end import FusedForward
from hf_geoscale.kernels.backend import triton_missing

from ..conftest import SHAPE, tiny_model, tokens
from ..kernels.fused_cases import DEVICE
from ..tolerances import E4M3_STEP

CONFIGS = {
    "certified": GeoScaleConfig(quantize_logits=True),
    "rank-aware": GeoScaleConfig(quantize_logits=True, bound="rank_aware"),
    "auto-alpha": GeoScaleConfig(quantize_logits=True, bound="auto_alpha", auto_alpha=AutoAlpha(burn_in=2)),
    "delayed": GeoScaleConfig(quantize_logits=True, scaling="delayed", delayed=Delayed(history=4)),
    "current": GeoScaleConfig(quantize_logits=True, scaling="current"),
}


def overflows(model) -> dict[str, int]:
    """Overflows of the whole model by operand."""
    total: dict[str, int] = {}
    for row in geometry_report(model).rows:
        for operand, count in row["overflows_by_operand"].items():
            total[operand] = total.get(operand, 0) + count
    return total


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
class TestEveryScaling:
    def test_trains_like_plain_attention(self, family, name):
        ids = tokens(2, 24)
        losses = {}
        for label, config in (("plain", None), ("fp8", CONFIGS[name])):
            model = tiny_model(family).train()
            if config is not None:
                patch_model(model, config, observe_logits=True)  # counts the backward's overflows on every backend
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            losses[label] = []
            for _ in range(3):
                torch.manual_seed(0)  # the same dropout in both
                loss = model(ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[label].append(loss.item())
        # dropout masks differ between the two implementations, so GPT-2 is compared in its trend only
        slack = E4M3_STEP if family == "llama" else 0.3
        assert losses["fp8"] == pytest.approx(losses["plain"], rel=slack)
        assert losses["fp8"][-1] < losses["fp8"][0]
        counts = overflows(model)
        assert counts.keys() == {"q", "k", "v", "logit", "logit gradient"}
        row = geometry_report(model).rows[0]
        if name == "delayed":  # without margin: whatever grew since the last step overflows, by a little
            assert 0 < row["utilisation"] < 1.5
        else:
            assert sum(counts.values()) == 0
            assert 0 < row["logit_utilisation"] <= 1
            assert 0 < row["utilisation"] <= 1

    def test_checkpointing_changes_no_gradient(self, family, name):
        ids, grads = tokens(2, 24), []
        for checkpointing in (False, True):
            # a recomputed forward counts as a call, so the burn-in would end earlier
            config = replace(CONFIGS[name], auto_alpha=AutoAlpha())
            model = patch_model(tiny_model(family).train(), config)
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            for layer in geoscale_layers(model):
                layer.site.attention.attn_dropout = torch.nn.Dropout(0.0)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            for _ in range(3):  # scales move between the steps
                model.zero_grad()
                model(ids, labels=ids, use_cache=False).loss.backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(parameter.grad, alpha=-0.1)
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert torch.equal(*grads)


class TestTransients:
    def test_pretrained_weights_under_a_fresh_history(self):
        """Delayed scaling starts at 1 and overflows once; the weights' certificates never do."""
        ids = tokens(1, 24)
        counts = {}
        for name in ("certified", "delayed"):
            model = tiny_model("llama")
            with torch.no_grad():
                for layer in model.model.layers:
                    layer.self_attn.q_proj.weight *= 1000
            patch_model(model, CONFIGS[name])
            counts[name] = []
            for _ in range(2):  # of the first layer, whose input stays the same
                with torch.no_grad():
                    model(ids)
                counts[name].append(geometry_report(model).rows[0]["overflows_by_operand"])
        assert not any(counts["certified"][1].values())
        first, both = counts["delayed"]
        assert first["q"] > 20
        assert first["logit"] > 20
        assert both["q"] - first["q"] <= 1  # the largest entry itself, by one unit in the last place

    def test_a_resumed_run_needs_the_state_of_delayed_scaling(self):
        ids, ran = tokens(1, 24), []
        trained = patch_model(tiny_model("llama"), CONFIGS["delayed"])
        with torch.no_grad():
            trained(ids)
            trained(ids)
        for restore in (True, False):
            model = patch_model(tiny_model("llama"), CONFIGS["delayed"])
            if restore:
                load_scaling_state_dict(model, scaling_state_dict(trained))
            with torch.no_grad():
                ran.append(model(ids).logits)
        with torch.no_grad():
            expected = trained(ids).logits
        assert torch.equal(ran[0], expected)
        assert not torch.equal(ran[1], expected)
        with pytest.raises(ValueError, match="2 FP8 layers, the state is of 1"):
            load_scaling_state_dict(trained, scaling_state_dict(trained)[:1])
        assert scaling_state_dict(patch_model(tiny_model("llama"))) == [{}, {}]


def wide_llama() -> LlamaForCausalLM:
    """Wide enough for α_min < 1. Head 0 turns with position: q lies mostly in one half of a RoPE pair and k in the other."""
    torch.manual_seed(0)
    shape = {**SHAPE, "hidden_size": 512, "head_dim": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.normal_()
        attention.q_proj.weight[0] *= 8
        attention.k_proj.weight[8] *= 8
    return model


def adversarial_batch(model) -> tuple[torch.Tensor, float, float]:
    """Input embeddings (1, L, d) with the largest logit of head 0 that two tokens reach at any offset within L.

    They lie along the top singular directions of A_Qᵀ R_Δ A_K at the offset Δ where that norm is largest. Returns also that logit
    and the largest one at Δ = 0, both for tokens of norm √d.
    """
    layer = geoscale_layers(model)[0]
    query, key, _ = layer.site.projections()
    bases = [torch.linalg.svd(p.matrix()[0].double(), full_matrices=False) for p in (query, key)]
    (core_q, directions_q), (core_k, directions_k) = ((u * s, vh) for u, s, vh in bases)
    length, width = 32, directions_q.shape[1]
    cos, sin = (x[0].double() for x in model.model.rotary_emb(torch.zeros(1, 1, 1), torch.arange(length)[None]))

    def rotated(core: torch.Tensor, position: int) -> torch.Tensor:
        half = core.shape[0] // 2
        turned = torch.cat([-core[half:], core[:half]])
        return core * cos[position][:, None] + turned * sin[position][:, None]

    last = length - 1
    found = [torch.linalg.svd(rotated(core_q, last).T @ rotated(core_k, position)) for position in range(length)]
    position = max(range(length), key=lambda i: float(found[i][1][0]))
    left, sigma, right = found[position]
    batch = torch.randn(1, length, width, generator=torch.Generator().manual_seed(0))
    batch[0, last], batch[0, position] = (left[:, 0] @ directions_q).float(), (right[0] @ directions_k).float()
    scale = width * layer.site.softmax_scale
    return batch, float(sigma[0]) * scale, float(found[last][1][0]) * scale


class TestAdversarialBatch:
    def count(self, bound: str) -> tuple[dict[str, int], float, float]:
        model = patch_model(wide_llama(), quantize_logits=True, bound=bound)
        batch, largest, at_zero = adversarial_batch(model)
        with torch.no_grad():
            model(inputs_embeds=batch)
        return geometry_report(model).rows[0]["overflows_by_operand"], largest, at_zero

    def test_the_norm_without_offset_is_no_bound_under_rope(self):
        """auto-α's burn-in has α = 1: it scales by σ(A_Qᵀ A_K), the norm at Δ = 0."""
        over, largest, at_zero = self.count("auto_alpha")
        assert largest > 2 * at_zero
        assert over["logit"] > 0

    def test_the_rank_aware_bound_is_exceeded(self):
        assert self.count("rank_aware")[0]["logit"] > 0

    def test_the_certificates_are_not(self):
        assert not any(self.count("certified")[0].values())


def test_rank_aware_needs_a_low_rank_interaction():
    with pytest.raises(UnsupportedModelError, match="normalises each head"):
        patch_model(tiny_model("qwen3"), quantize_logits=True, bound="rank_aware")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_current_scaling_under_a_fused_forward_that_somebody_wrapped(family):
    """It outlives patching anew, and hands over q and k before norm and RoPE; the scales are of q and k after both."""
    model, ids = tiny_model(family), tokens(1, 40)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data.mul_(4)
    exact = patch_model(model, backend="reference", scaling="current", fused_front_end=False)(
        ids, use_cache=False
    ).logits
    patch_model(model, backend="reference")
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            module.forward = partial(module.forward)
    patch_model(model, backend="reference", scaling="current")
    assert torch.equal(model(ids, use_cache=False).logits, exact)
    assert overflows(model) == {"q": 0, "k": 0, "v": 0}


@pytest.mark.skipif(
    triton_missing(DEVICE) is not None, reason=f"the fused kernels cannot run: {triton_missing(DEVICE)}"
)
def test_current_scaling_loses_nothing_in_the_fused_kernels():
    """They take float32 operands as bfloat16, which can round the largest one up."""
    for seed in range(2):
        model = tiny_model("llama", seed=seed, spread=0.3).to(DEVICE)
        patch_model(model, scaling="current", backend="triton")
        with torch.no_grad():
            model(tokens(1, 16, seed=seed).to(DEVICE))
        assert overflows(model) == {"q": 0, "k": 0, "v": 0, "logit": 0}

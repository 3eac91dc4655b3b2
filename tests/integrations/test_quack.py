"""QuacK on Hugging Face models: where the heads are, MLA's rules, the Trainer, refusals."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Trainer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from benchmarks.families import tiny
from hf_geoscale import GeoScaleCallback, QuacK, patch_model
from hf_geoscale.integrations.callback import adam_step_bound
from hf_geoscale.integrations.families import attention_sites
from hf_geoscale.integrations.logit_weights import logit_weights
from hf_geoscale.stability.quack import INITIAL_REACH

from ..conftest import SHAPE, tiny_model, tokens
from .test_callback import trainer

LAYOUTS = ["llama", "qwen2", "gpt2", "gpt_bigcode", "gpt_bigcode-many-keys", "gpt_neox", "phi3"]
"""Separate, with biases, Conv1D, one shared key head, interleaved, fused blocks."""

MLA = {
    "deepseek_v2": (DeepseekV2ForCausalLM, DeepseekV2Config, {}),
    "deepseek_v2-lite": (DeepseekV2ForCausalLM, DeepseekV2Config, {"q_lora_rank": None}),
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, {}),
}


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    if case in MLA:
        model, config, options = MLA[case]
        latent = {
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        }
        shape = SHAPE | {"num_key_value_heads": 4, "first_k_dense_replace": 2, "num_hidden_layers": 2}
        return model(config(**(shape | latent | options))).train()
    if case == "gpt_bigcode-many-keys":
        return tiny("gpt_bigcode", multi_query=False).train()
    return tiny(case).train()


def train_step(model: nn.Module, optimizer) -> float:
    batch = tokens(2, 16) % model.config.vocab_size
    torch.manual_seed(1)  # dropout
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("case", LAYOUTS)
class TestLayouts:
    def test_norms_are_those_of_the_heads(self, case):
        model = build(case)
        weights, layers = logit_weights(model)
        norms = weights.norms()
        for site, layer in zip(attention_sites(model), layers, strict=True):
            query, key, _ = site.projections()
            for projection, slots in ((query, layer.query), (key, layer.key)):
                expected = projection.weight.detach().double().flatten(1).norm(dim=1)
                torch.testing.assert_close(norms[slots], expected, rtol=1e-6, atol=0)

    def test_updates_of_queries_and_keys_are_scaled_and_no_others(self, case):
        """With τ = 0.25 and SGD: weights and biases of q and k move by a quarter of what they do plainly."""
        plain, controlled = build(case), build(case)
        start = {name: p.detach().clone() for name, p in plain.named_parameters()}
        train_step(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        train_step(controlled, QuacK(torch.optim.SGD(controlled.parameters(), lr=0.1), controlled, tau=0.25))
        scaled = {}
        for weight in logit_weights(controlled)[0].parameters:
            shape = [-1 if d == weight.dim else 1 for d in range(weight.parameter.dim())]
            scaled[id(weight.parameter)] = torch.where(weight.labels < 0, 1.0, 0.25).view(shape)
        moved = dict(plain.named_parameters())
        for name, parameter in controlled.named_parameters():
            factor = scaled.get(id(parameter), torch.ones(()))
            expected = start[name] + factor * (moved[name] - start[name])
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-7, msg=name)
        assert len(scaled) == len(logit_weights(controlled)[0].parameters)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox"])
def test_norms_on_a_gpu_are_the_same_bits_every_time(case):
    """Replicas under DDP compute them apart."""
    model = build(case)
    expected = logit_weights(model)[0].norms().cpu()
    weights, _ = logit_weights(model.cuda())
    first = weights.norms()
    torch.testing.assert_close(first.cpu(), expected, rtol=1e-6, atol=0)
    assert all(torch.equal(weights.norms(), first) for _ in range(20))


class Logits:
    """Logits of the first layer, with RoPE, while `record` runs."""

    def __init__(self):
        AttentionInterface.register("logits", self.attend)
        AttentionMaskInterface.register("logits", sdpa_mask)

    def attend(self, module, query, key, value, attention_mask, **call):
        if module.layer_idx == 0:
            self.seen = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * module.scaling
        return sdpa_attention_forward(module, query, key, value, attention_mask, **call)

    @torch.no_grad()
    def record(self, model) -> torch.Tensor:  # (B, Hq, L, L)
        model(input_ids=tokens(2, 16), use_cache=False)
        return self.seen


@pytest.mark.parametrize("controlled", [True, False])
def test_change_of_a_models_logits_as_its_weights_grow(controlled):
    """AdamW on a Llama in float64: W_Q grown by 3 and W_K by 20 change the update's effect on the logits only without QuacK."""
    changes, logits = [], Logits()
    for growth_q, growth_k in ((1, 1), (3, 20)):
        model = build("llama").double()
        attention = model.model.layers[0].self_attn
        weights = [attention.q_proj.weight, attention.k_proj.weight]
        optimizer = torch.optim.AdamW(weights, lr=1e-6, weight_decay=0.0)
        optimizer = QuacK(optimizer, model) if controlled else optimizer
        if controlled:
            optimizer.factors()
        with torch.no_grad():
            for weight, growth in zip(weights, (growth_q, growth_k), strict=True):
                weight.mul_(growth)
                weight.grad = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(1))
        model.set_attn_implementation("logits")
        before = logits.record(model)
        optimizer.step()
        changes.append(logits.record(model) - before)
    ratio = float(changes[1].norm() / changes[0].norm())
    if controlled:
        torch.testing.assert_close(changes[1], changes[0], rtol=0, atol=1e-3 * float(changes[0].abs().max()))
    else:
        assert ratio > 5


@pytest.mark.parametrize("case", MLA)
class TestLatentAttention:
    def test_factors_are_the_papers(self, case):
        model = build(case)
        control = QuacK(torch.optim.AdamW(model.parameters()), model, tau=0.5, latent_rules="published")
        start = [self.inverse_factors(layer.self_attn) for layer in model.model.layers]
        torch.testing.assert_close(control.factors(), torch.full_like(control.factors(), 0.5))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for slices in logit_weights(model)[0].weights:
                slices.parameter.mul_(torch.rand(slices.parameter.shape, generator=generator) * 4)
        now = [self.inverse_factors(layer.self_attn) for layer in model.model.layers]
        factors, names = control.factors(), control.weights.names
        for layer, (before, after) in enumerate(zip(start, now, strict=True)):
            for name, value in after.items():
                found = float(factors[names.index(f"layer {layer}, {name}")])
                assert found == pytest.approx(0.5 * before[name] / value, rel=1e-5), name
        assert len(names) == sum(map(len, now))

    @staticmethod
    def inverse_factors(attention) -> dict[str, float]:
        """Written out from the paper's list, with weights cut by hand; ‖dq‖ = 1 where there is no query latent."""
        heads, nope, rank = attention.num_heads, attention.qk_nope_head_dim, attention.kv_lora_rank
        queries = attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj
        q = queries.weight.detach().view(heads, attention.qk_head_dim, -1)
        k = attention.kv_b_proj.weight.detach().view(heads, nope + attention.v_head_dim, -1)
        uq, qr, uk = ([float(w.norm()) for w in part] for part in (q[:, :nope], q[:, nope:], k[:, :nope]))
        shared = attention.kv_a_proj_with_mqa.weight.detach()
        dkv, kr = float(shared[:rank].norm()), float(shared[rank:].norm())
        dq = 1.0 if attention.q_lora_rank is None else float(attention.q_a_proj.weight.detach().norm())
        found = {}
        for h in range(heads):
            found[f"W_UQ of head {h}"] = dq * uk[h] * dkv
            found[f"W_UK of head {h}"] = uq[h] * dq * dkv
            found[f"W_QR of head {h}"] = dq * kr
        found["W_DKV"] = max(uq[h] * dq * uk[h] for h in range(heads))
        found["W_KR"] = max(qr[h] * dq for h in range(heads))
        if attention.q_lora_rank is not None:
            found["W_DQ"] = max(*(uq[h] * uk[h] * dkv for h in range(heads)), *(qr[h] * kr for h in range(heads)))
        return found

    def test_values_move_freely(self, case):
        plain, controlled = build(case), build(case)
        train_step(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        train_step(controlled, QuacK(torch.optim.SGD(controlled.parameters(), lr=0.1), controlled, tau=0.5))
        for a, b in zip(plain.model.layers, controlled.model.layers, strict=True):
            heads = [m.self_attn.kv_b_proj.weight.view(4, 32, -1) for m in (a, b)]
            assert torch.equal(heads[0][:, 16:], heads[1][:, 16:])
            assert not torch.equal(heads[0][:, :16], heads[1][:, :16])


class TestTraining:
    def test_in_a_trainer_with_accumulation_schedule_and_fp8(self, tmp_path):
        """A run of 4 steps equals one stopped after 2 and resumed, bit for bit, scales refreshed after each step."""

        def run(folder, resume=None, steps=4):
            model = patch_model(tiny_model("llama").train())
            optimizer = QuacK(torch.optim.AdamW(model.parameters(), lr=1e-2), model)
            callback = GeoScaleCallback(every_n_steps=3)
            options = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear", "warmup_steps": 1}
            options |= {"save_strategy": "steps", "save_steps": 2}
            loop = trainer(model, folder, callback, steps=4, **options)
            loop.optimizer = optimizer
            loop.train(resume_from_checkpoint=resume)
            return model, optimizer, callback

        model, optimizer, callback = run(tmp_path)
        resumed, again, _ = run(tmp_path, str(tmp_path / "checkpoint-2"))
        for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)
        assert again.param_groups[0][INITIAL_REACH] == optimizer.param_groups[0][INITIAL_REACH]
        assert (optimizer.factors() - 1).abs().max() > 0.005
        assert callback.steps == 0  # no bound of QuacK's steps is known, so scales were refreshed after each

    def test_where_the_trainer_makes_the_optimizer_as_the_docs_say(self, tmp_path):
        page = (Path(__file__).parents[2] / "docs" / "logit_control.md").read_text()
        code, scope = page[page.index("class QuacKTrainer") :].partition("```")[0], {"Trainer": Trainer, "QuacK": QuacK}
        exec(code, scope)
        plain = trainer(build("llama"), tmp_path)
        loop = scope["QuacKTrainer"](model=plain.model, args=plain.args, train_dataset=plain.train_dataset)
        loop.train()
        assert isinstance(loop.optimizer.optimizer, QuacK)
        assert (loop.optimizer.optimizer.factors() - 1).abs().max() > 1e-4  # after four small steps

    def test_its_steps_are_not_taken_for_plain_adams(self):
        model = build("llama")
        optimizer = torch.optim.AdamW(model.parameters())
        assert adam_step_bound(optimizer, 1.0, 2.0**-8) is not None
        assert adam_step_bound(QuacK(optimizer, model, tau=10.0), 1.0, 2.0**-8) is None

    def test_with_muon_and_adamw_side_by_side(self):
        muon = pytest.importorskip("torch.optim._muon", reason="torch.optim.Muon came with torch 2.9").Muon
        model = build("llama")
        matrices = [p for layer in model.model.layers for p in layer.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
        optimizers = [QuacK(muon(matrices, lr=0.02), model), torch.optim.AdamW(rest, lr=1e-3)]

        class Both:
            def step(self):
                for optimizer in optimizers:
                    optimizer.step()

            def zero_grad(self):
                for optimizer in optimizers:
                    optimizer.zero_grad()

        losses = [train_step(model, Both()) for _ in range(8)]
        assert losses[-1] < losses[0] - 0.3
        assert (optimizers[0].factors() - 1).abs().max() > 0.01

    def test_under_a_gradient_scaler(self):
        """A step with an infinite gradient is skipped, the next one is taken."""
        model = build("llama")
        optimizer = QuacK(torch.optim.AdamW(model.parameters(), lr=1e-2), model)
        scaler = torch.amp.GradScaler(model.device.type, init_scale=4.0)
        start = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
        for factor, moves in ((torch.inf, False), (1.0, True)):
            batch = tokens(2, 16)
            scaler.scale(model(input_ids=batch, labels=batch).loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, start) is not moves

    def test_of_frozen_keys_leaves_them(self):
        model = build("llama")
        for layer in model.model.layers:
            layer.self_attn.k_proj.requires_grad_(False)
        keys = [layer.self_attn.k_proj.weight.clone() for layer in model.model.layers]
        train_step(
            model, QuacK(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model, 0.5)
        )
        assert all(
            torch.equal(layer.self_attn.k_proj.weight, k) for layer, k in zip(model.model.layers, keys, strict=True)
        )

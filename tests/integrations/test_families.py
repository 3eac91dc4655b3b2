"""What every supported family must satisfy: accuracy, certificates, exact undoing."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_geoscale.integrations.attention as attention_module
from hf_geoscale import geometry_report, patch_model, unpatch_model
from hf_geoscale.geometry import entry_bound
from hf_geoscale.geometry.certificates import ROUNDING_MARGIN
from hf_geoscale.integrations import geoscale_layers

from ..conftest import tiny_model, tokens
from ..tolerances import E4M3_STEP, GRADIENT_ERROR, OUTPUT_ERROR


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.fixture
def spied(monkeypatch):
    """Calls of the FP8 op as (query, key, value, softmax_scale)."""
    calls = []
    original = attention_module.fp8_attention

    def spy(query, key, value, **options):
        calls.append((query.detach(), key.detach(), value.detach(), options["softmax_scale"]))
        return original(query, key, value, **options)

    monkeypatch.setattr(attention_module, "fp8_attention", spy)
    return calls


class TestEveryFamily:
    def test_logits_and_gradients_stay_close(self, family):
        model, ids = tiny_model(family), tokens(2, 40)
        exact = model(ids, labels=ids)
        exact.loss.backward()
        exact_grads = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        patch_model(model)
        ours = model(ids, labels=ids)
        ours.loss.backward()
        # the attention's error dilutes in the residual stream, and two layers add up
        assert relative(ours.logits, exact.logits) < OUTPUT_ERROR
        total = torch.cat([g.flatten() for g in exact_grads.values()])
        mine = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert relative(mine, total) < GRADIENT_ERROR
        report = geometry_report(model)
        assert [row["calls"] for row in report.rows] == [1, 1]
        assert [row["overflows"] for row in report.rows] == [0, 0]

    def test_unpatch_gives_the_same_bits(self, family):
        model, ids = tiny_model(family), tokens(2, 40)
        before = model(ids).logits
        implementation = model.config._attn_implementation
        patch_model(model)
        assert not torch.equal(model(ids).logits, before)
        unpatch_model(model)
        assert torch.equal(model(ids).logits, before)
        assert model.config._attn_implementation == implementation
        assert not geoscale_layers(model)

    def test_certificates_hold_on_random_and_adversarial_tokens(self, family, spied):
        """Layer 0 is fed tokens along the singular directions of its own projections; nothing passes a bound."""
        model = patch_model(tiny_model(family), observe_logits=True)
        if hasattr(model, "transformer"):
            model.transformer.wpe.weight.data.zero_()
        layer = geoscale_layers(model)[0]
        directions = []
        for projection in layer.site.projections():
            weight = projection.weight if projection.weight.shape[-1] == 64 else None
            if weight is None:  # a per-head norm follows: aim at its largest gain through the projection
                weight = layer.site.attention.q_proj.weight.view(4, -1, 64)
            gain = 1 if projection.norm_gain is None else projection.norm_gain
            directions.append(torch.linalg.svd(weight * gain, full_matrices=False)[2][:, :3].flatten(0, 1))
        adversarial = torch.cat(directions)
        adversarial = (
            adversarial if not hasattr(model, "transformer") else adversarial - adversarial.mean(-1, keepdim=True)
        )
        random = torch.randn(60, 64, generator=torch.Generator().manual_seed(0))
        embeddings = 1e3 * torch.cat([adversarial, -adversarial, random])[None]  # far above the norm's epsilon
        with torch.no_grad():
            model(inputs_embeds=embeddings)
        geometry = layer.geometry
        query, key, value, softmax_scale = spied[0]
        for operand, bound in ((query, geometry.q_bound), (key, geometry.k_bound), (value, geometry.v_bound)):
            norms = operand.norm(dim=-1).amax((0, 2)).double()
            assert (norms <= bound / (1 + ROUNDING_MARGIN) * (1 + 1e-5)).all()
            assert (norms.amax() >= 0.6 * bound.amax()).all()  # the tokens do aim at the bound
        entries = value[0].abs().amax(1)
        assert (entries <= entry_bound(layer.site.projections()[2])).all()
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = (query @ keys.mT * softmax_scale).abs().amax((0, 2, 3))
        assert (logits <= geometry.logit_bound).all()
        row = geometry_report(model).rows[0]
        assert row["overflows"] == 0
        assert row["utilisation"] <= 1
        assert all(
            seen <= bound * (1 + E4M3_STEP) ** 2
            for seen, bound in zip(row["logit_amax"], row["logit_bound"], strict=True)
        )

    def test_padding_left_and_right(self, family):
        model, ids = tiny_model(family), tokens(2, 40)
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        mask[1, 30:] = 0
        exact = model(ids, attention_mask=mask).logits
        patch_model(model)
        ours = model(ids, attention_mask=mask).logits
        assert torch.isfinite(ours).all()
        assert relative(ours[mask.bool()], exact[mask.bool()]) < OUTPUT_ERROR
        assert relative(ours[mask.bool()], model(ids).logits[mask.bool()]) > 0.1 * OUTPUT_ERROR  # the mask matters

    def test_packing_by_position_ids(self, family):
        model, ids = tiny_model(family), tokens(1, 40)
        positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
        exact = model(ids, position_ids=positions, use_cache=False).logits
        patch_model(model)
        ours = model(ids, position_ids=positions, use_cache=False).logits
        assert relative(ours, exact) < OUTPUT_ERROR

    def test_the_past_does_not_see_the_future(self, family):
        model = patch_model(tiny_model(family))
        ids = tokens(2, 100)
        other = ids.clone()
        other[:, 70:] = tokens(2, 30, seed=1)
        with torch.no_grad():
            a, b = model(ids).logits, model(other).logits
        assert torch.equal(a[:, :70], b[:, :70])
        assert not torch.equal(a[:, 70:], b[:, 70:])

    def test_generation_with_a_cache(self, family):
        model, ids = tiny_model(family), tokens(2, 12)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        patch_model(model)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
        assert out.sequences.shape == (2, 18)
        row = geometry_report(model).rows[0]
        assert row["calls"] == 1  # the prompt
        assert row["fallback_reasons"] == {"kv_cache": 5}
        # the same tokens without a cache: the prompt's logits are the same bits, decoding agrees within the attention's error
        full = model(out.sequences[1:, :-1], use_cache=False).logits[0, 11:]
        decoded = torch.stack(out.logits)[:, 1]
        assert relative(decoded, full) < OUTPUT_ERROR

    def test_generation_with_a_static_cache_and_padding(self, family):
        model, ids = tiny_model(family), tokens(2, 12)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        options = {
            "max_new_tokens": 4,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
            "disable_compile": True,
        }
        exact = model.generate(ids, attention_mask=mask, cache_implementation="static", **options)
        patch_model(model)
        ours = model.generate(ids, attention_mask=mask, cache_implementation="static", **options)
        assert torch.equal(ours[:, :12], exact[:, :12])
        row = geometry_report(model).rows[0]
        assert row["calls"] + row["fallback_calls"] == 4

    def test_save_pretrained_is_an_ordinary_model(self, family, tmp_path):
        model, ids = tiny_model(family), tokens(1, 20)
        before = model(ids).logits
        patch_model(model)
        model.save_pretrained(tmp_path)
        text = (tmp_path / "config.json").read_text()
        assert "geoscale" not in text
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert loaded.config._attn_implementation == "sdpa"
        torch.testing.assert_close(loaded(ids).logits, before, rtol=0, atol=0)

    def test_deepcopy_is_a_patched_model_of_its_own(self, family):
        model, ids = patch_model(tiny_model(family)), tokens(1, 20)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids).logits, model(ids).logits)
        with torch.no_grad():
            next(p for n, p in twin.named_parameters() if "q_proj" in n or "c_attn" in n).mul_(3)
        twin(ids)
        bounds = [geometry_report(m).rows[0]["q_bound"] for m in (twin, model)]
        if family != "qwen3":  # its q norm makes the weights irrelevant
            assert max(bounds[0]) > 2 * max(bounds[1])
        unpatch_model(twin)
        assert geoscale_layers(model)

    def test_report_rows(self, family):
        model = patch_model(tiny_model(family))
        rows = geometry_report(model).rows
        assert len(rows) == 2
        for index, row in enumerate(rows):
            assert row["layer"] == index
            assert row["family"] == model.config.model_type
            assert len(row["sigma_lower"]) == len(row["q_bound"]) == len(row["logit_bound"]) == 4
            assert all(
                low <= high * (1 + 1e-9) for low, high in zip(row["sigma_lower"], row["sigma_upper"], strict=True)
            )
            assert row["alpha_observed"] is None
            assert row["overflows"] == row["calls"] == row["fallback_calls"] == 0
            assert (row["alpha_min"] is None) if family == "qwen3" else (row["alpha_min"] > 0)
        assert geometry_report(model).to_markdown().count("\n") == 4

    def test_gradient_checkpointing_gives_the_same_bits(self, family):
        ids, grads = tokens(2, 30), []
        for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
            model = patch_model(tiny_model(family)).train()
            if options is not None:
                model.gradient_checkpointing_enable(options)
                model.enable_input_require_grads()
            torch.manual_seed(3)  # dropout of GPT-2
            model(ids, labels=ids, use_cache=False).loss.backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert torch.equal(grads[0], grads[1])
        assert torch.equal(grads[0], grads[2])

    def test_bfloat16_and_autocast(self, family):
        model, ids = tiny_model(family), tokens(2, 30)
        exact = model(ids).logits
        patch_model(model)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            cast = model(ids, labels=ids)
        cast.loss.backward()
        assert relative(cast.logits.float(), exact) < OUTPUT_ERROR
        model = unpatch_model(model).to(torch.bfloat16)
        patch_model(model)
        assert relative(model(ids).logits.float(), exact) < OUTPUT_ERROR
        assert sum(row["overflows"] for row in geometry_report(model).rows) == 0


@pytest.mark.gpu
def test_a_patched_model_moves_to_the_gpu_and_trains_there(family):
    model, ids = patch_model(tiny_model(family).cpu()), tokens(2, 40).cpu()
    cpu = model(ids, labels=ids)
    cpu.loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    model.cuda()
    gpu = model(ids.cuda(), labels=ids.cuda())
    gpu.loss.backward()
    assert geoscale_layers(model)[0].geometry.q_bound.is_cuda
    # flipped roundings re-draw the noise, which is no larger than the error itself
    assert relative(gpu.logits.cpu(), cpu.logits) < OUTPUT_ERROR
    assert relative(torch.cat([p.grad.flatten() for p in model.parameters()]).cpu(), grads) < GRADIENT_ERROR
    assert sum(row["overflows"] for row in geometry_report(model).rows) == 0


@pytest.mark.gpu
def test_bounds_on_the_gpu_ignore_tf32(family):
    model = tiny_model(family).cpu()
    patch_model(model)
    exact = [layer.geometry.q_bound for layer in geoscale_layers(model)]
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        unpatch_model(model).cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            patch_model(model)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    for layer, bound in zip(geoscale_layers(model), exact, strict=True):
        torch.testing.assert_close(layer.geometry.q_bound.cpu(), bound, rtol=1e-12, atol=0)

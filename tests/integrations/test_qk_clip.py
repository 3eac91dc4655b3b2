"""QK-Clip with observed logits and with certificates: after a step no head passes the threshold, and others are left alone."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_geoscale import GeoScaleCallback, QKClip, UnsupportedModelError, geometry_report, patch_model
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.logit_observer import logit_amax

from ..conftest import tiny_model, tokens
from ..tolerances import FLOAT32_ROUNDOFF, FUSED_LOGITS
from .test_callback import trainer
from .test_quack import MLA, build

FAMILIES = ["llama", "qwen2", "gpt2", "gpt_neox", "phi3"]
ROUNDOFF = 50 * FLOAT32_ROUNDOFF
"""Of logits before and after the weights were multiplied: a few products of float32 more."""


def observe(model) -> torch.Tensor:
    """Largest |logit| of every layer's heads on one batch, in training mode without dropout: (layers, Hq)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    clip = QKClip(model)
    model.train()(input_ids=tokens(2, 16) % model.config.vocab_size, use_cache=False)
    found = torch.stack(clip.observer.drain())
    clip.remove()
    return found


def dense_logits(model) -> torch.Tensor:
    """The same, from q and k of the attention interface and a mask of our own."""
    seen = []

    def spy(module, query, key, value, attention_mask, scaling=None, **call):
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = (query @ keys.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)).abs()
        seen.append(logits.tril().amax((0, 2, 3)).detach())
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **call)

    AttentionInterface.register("dense_spy", spy)
    AttentionMaskInterface.register("dense_spy", sdpa_mask)
    model.set_attn_implementation("dense_spy")
    model(input_ids=tokens(2, 16) % model.config.vocab_size, use_cache=False)
    model.set_attn_implementation("sdpa")
    return torch.stack(seen)


class TestObserver:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_sees_the_largest_visible_logit(self, implementation):
        model = tiny_model("llama", spread=0.3)
        model.set_attn_implementation(implementation)
        outputs = model(input_ids=tokens(2, 16)).logits
        found = observe(model)
        torch.testing.assert_close(found, dense_logits(model), rtol=ROUNDOFF, atol=0)
        model.set_attn_implementation(implementation)
        assert torch.equal(model.eval()(input_ids=tokens(2, 16)).logits, outputs)

    def test_in_chunks_with_padding_and_a_float_mask(self, monkeypatch):
        query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
        logits = query @ key.repeat_interleave(2, dim=1).mT * 0.5
        visible = torch.ones(9, 9).tril().bool().expand(2, 1, 9, 9).clone()
        visible[0, :, :, :4] = False
        expected = logits.masked_fill(~visible, 0).abs().amax((0, 2, 3))
        added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        for entries in (1, 2**20):
            monkeypatch.setattr("hf_geoscale.integrations.logit_observer.CHUNK_ENTRIES", entries)
            for mask in (visible, added):
                torch.testing.assert_close(logit_amax(query, key, mask, 0.5, True), expected)
            causal = logits.tril().abs().amax((0, 2, 3))
            torch.testing.assert_close(logit_amax(query, key, None, 0.5, True), causal)
            torch.testing.assert_close(logit_amax(query, key, None, 0.5, False), logits.abs().amax((0, 2, 3)))

    def test_looks_at_training_only_and_lets_other_models_be(self):
        model = tiny_model("llama")
        other = type(model)(model.config)
        clip = QKClip(model)
        assert other.config._attn_implementation == "sdpa"
        model.eval()(input_ids=tokens(2, 16))
        assert clip.observer.drain() is None
        clip.remove()
        assert model.config._attn_implementation == "sdpa"

    def test_refuses_implementations_without_visible_masks(self):
        model = tiny_model("llama")
        model.config._attn_implementation = "flex_attention"
        with pytest.raises(
            ValueError, match="under attn_implementation 'sdpa' or 'eager', the model runs 'flex_attention'"
        ):
            QKClip(model)


class TestObserved:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_first_layers_heads_come_down_to_the_threshold(self, family):
        """Layer 0 sees the same tokens before and after; heads below the threshold keep their logits, shared keys or not."""
        model = build(family)
        before = observe(model)
        threshold = float(before[0].median())
        clip = QKClip(model, threshold=threshold)
        model(input_ids=tokens(2, 16) % model.config.vocab_size, use_cache=False)
        assert clip.step() == int((before > threshold).sum())
        assert clip.logit_amax == pytest.approx(float(before.max()))
        clip.remove()
        torch.testing.assert_close(observe(model)[0], before[0].clamp(max=threshold), rtol=ROUNDOFF, atol=0)

    @pytest.mark.parametrize("case", MLA)
    def test_latent_attention(self, case):
        model = build(case)
        before = observe(model)
        threshold = float(before[0].median())
        clip = QKClip(model, threshold=threshold)
        model(input_ids=tokens(2, 16))
        shared = model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.clone()
        assert clip.step() > 0
        clip.remove()
        assert torch.equal(model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight, shared)
        torch.testing.assert_close(observe(model)[0], before[0].clamp(max=threshold), rtol=ROUNDOFF, atol=0)

    def test_writes_nothing_below_the_threshold(self):
        model = build("llama")
        versions = [p._version for p in model.parameters()]
        clip = QKClip(model, threshold=1e3)
        model(input_ids=tokens(2, 16))
        assert clip.step() == 0
        assert [p._version for p in model.parameters()] == versions

    def test_of_a_patched_model_uses_what_its_kernels_saw(self):
        model = patch_model(tiny_model("llama", spread=0.3).train(), observe_logits=True)
        clip = QKClip(model, threshold=2.0)
        model(input_ids=tokens(2, 16))
        before = torch.tensor([row["logit_amax"] for row in geometry_report(model).rows])
        assert clip.step() == int((before > 2.0).sum()) > 0
        model(input_ids=tokens(2, 16))  # with fresh scales: the clipped weights were seen
        after = torch.tensor(geometry_report(model).rows[0]["logit_amax"])
        torch.testing.assert_close(
            after, before[0].clamp(max=2.0), rtol=0.05, atol=0
        )  # q and k are rounded to E4M3 anew

    def test_of_a_patched_model_evaluation_counts_for_nothing(self):
        model = patch_model(tiny_model("llama", spread=0.3).train(), observe_logits=True)
        clip, short = QKClip(model, threshold=1e3), tokens(2, 16)[:, :2]
        model.eval()(input_ids=tokens(2, 16))
        with pytest.raises(ValueError, match="saw no logits of some layer since the last step"):
            clip.step()
        model.train()(input_ids=short)
        trained = [layer.statistics.logit_amax.clone() for layer in geoscale_layers(model)]
        model.eval()(input_ids=tokens(2, 16))
        assert all(torch.equal(a, b) for a, b in zip(trained, clip._observed(), strict=True))
        clip.remove()
        model(input_ids=tokens(2, 16))
        seen = torch.stack([layer.statistics.logit_amax for layer in geoscale_layers(model)])
        assert (seen > torch.stack(trained)).any()  # so the evaluation would have counted

    def test_clipped_weights_are_measured_again_whoever_accepted_their_drift(self):
        model = patch_model(tiny_model("llama", spread=0.3).train(), observe_logits=True, headroom=4.0)
        clip = QKClip(model, threshold=2.0)
        model(input_ids=tokens(2, 16))
        before = [layer.geometry.logit_bound for layer in geoscale_layers(model)]
        assert clip.step() > 0
        for layer in geoscale_layers(model):
            layer.accept_drift()  # as GeoScaleCallback does between refreshes
        model(input_ids=tokens(2, 16))
        for layer, old in zip(geoscale_layers(model), before, strict=True):
            assert (layer.geometry.logit_bound < old).any()

    @pytest.mark.parametrize("first", ["clip", "scales"])
    def test_in_a_trainer_before_or_after_the_refresh_of_scales(self, tmp_path, first):
        model = patch_model(tiny_model("llama", spread=0.3).train(), observe_logits=True, headroom=4.0)
        clip = QKClip(model, threshold=1.0)
        callbacks = [clip, GeoScaleCallback(every_n_steps=2)]
        loop = trainer(model, tmp_path, *(callbacks if first == "clip" else callbacks[::-1]), learning_rate=1e-4)
        loop.train()
        logged = [entry for entry in loop.state.log_history if "loss" in entry]
        heads = [entry["qk_clip/clipped_heads"] for entry in logged]
        assert heads == sorted(heads)
        assert 0 < heads[0] <= heads[-1] == clip.clipped_heads
        assert logged[-1]["qk_clip/logit_amax"] < 2.0 < logged[0]["qk_clip/logit_amax"]
        assert sum(row["overflows"] for row in geometry_report(model).rows) == 0

    def test_refuses_a_patched_model_that_observes_nothing(self):
        with pytest.raises(
            ValueError, match=r"patched without observing logits: patch_model\(model, observe_logits=True\)"
        ):
            QKClip(patch_model(build("llama")))

    def test_refuses_a_step_without_a_forward(self):
        with pytest.raises(ValueError, match="saw no logits of some layer since the last step: call step"):
            QKClip(build("llama")).step()


class TestCertificate:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("patched", [False, True])
    def test_bounds_every_logit_afterwards(self, family, patched):
        model = build(family)
        certified = patch_model(build(family)) if patched else model
        before = QKClip(certified, source="certificate")._certificates()
        threshold = float(before[0].median())
        clip = QKClip(certified, threshold=threshold, source="certificate")
        assert clip.step() == sum(int((b > threshold).sum()) for b in before) > 0
        for old, new in zip(before, clip._certificates(), strict=True):
            torch.testing.assert_close(new, old.clamp(max=threshold), rtol=1e-5, atol=0)
        if patched:
            rows = geometry_report(certified).rows  # of fresh certificates
            assert max(max(row["logit_bound"]) for row in rows) <= threshold * (1 + FUSED_LOGITS)
        else:
            assert observe(model).max() <= threshold

    def test_needs_no_forward_and_says_how_large_logits_could_be(self):
        clip = QKClip(tiny_model("llama", spread=0.3), source="certificate")
        clip.step()
        assert clip.logit_amax > 100
        clip.step()
        assert clip.logit_amax == pytest.approx(100, rel=1e-5)

    def test_refuses_latent_attention(self):
        with pytest.raises(UnsupportedModelError, match="'deepseek_v3' is not supported: multi-head latent attention"):
            QKClip(build("deepseek_v3"), source="certificate")


class TestRefusals:
    def test_q_and_k_norms(self):
        with pytest.raises(
            UnsupportedModelError, match=r"normalises queries and keys.*neither QuacK nor QK-Clip does anything"
        ):
            QKClip(tiny_model("qwen3"))

    @pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
    def test_thresholds(self, threshold):
        with pytest.raises(ValueError, match=f"threshold must be positive and finite, got {threshold}"):
            QKClip(build("llama"), threshold=threshold)

    def test_sources(self):
        with pytest.raises(ValueError, match="source must be 'observed' or 'certificate', got 'weights'"):
            QKClip(build("llama"), source="weights")

    def test_frozen_weights(self):
        model = build("llama")
        model.model.layers[1].self_attn.q_proj.requires_grad_(False)
        with pytest.raises(ValueError, match=r"1 of them are frozen \(layer 1: q_proj.weight\)"):
            QKClip(model)

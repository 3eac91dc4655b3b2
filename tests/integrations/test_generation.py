"""Caches and generation: prompts and long continuations in FP8, decoding on SDPA, every call counted."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_geoscale import UnsupportedAttentionError, geometry_report, patch_model
from hf_geoscale.integrations.masks import CONTINUATION_ROWS
from hf_geoscale.kernels.backend import triton_missing

from ..conftest import tiny_model, tokens
from ..kernels.conftest import hardware_rounding  # noqa: F401 - a fixture
from ..tolerances import FLIPPED_ROUNDINGS, FUSED_RUNS, OUTPUT_ERROR
from .compare import calls, relative, same_attention

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "disable_compile": True}
FAMILIES = ["llama", "gpt2", "mistral-window"]


def left_padded(length: int, padding: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(2, length)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def new_cache(kind: str, model):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=200)
    return (
        DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache(config=model.config, offloading=True)
    )


def in_chunks(model, ids, chunks, cache, mask=None) -> torch.Tensor:
    """Logits of a sequence fed chunk by chunk through a cache."""
    logits, seen = [], 0
    for chunk in ids.split(chunks, dim=1):
        seen += chunk.shape[1]
        given = {} if mask is None else {"attention_mask": mask[:, :seen]}
        if mask is not None:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, seen - chunk.shape[1] : seen]
        logits.append(model(chunk, past_key_values=cache, use_cache=True, **given).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
class TestCaches:
    @pytest.mark.feature("static cache")
    @pytest.mark.parametrize("padded", [False, True])
    def test_the_prompt_of_a_static_cache(self, family, padded):
        model, (ids, mask) = tiny_model(family), left_padded(12)
        given = {"attention_mask": mask} if padded else {}
        patch_model(model, fused_front_end=False)  # only calls without a cache take it, and it rounds elsewhere
        expected = model(ids, use_cache=False, **given).logits
        with torch.no_grad():
            ours = model(ids, past_key_values=new_cache("static", model), use_cache=True, **given).logits
        assert calls(model) == (2, {})
        rows = mask.bool() if padded else torch.ones_like(ids, dtype=torch.bool)
        assert relative(ours[rows], expected[rows]) < FLIPPED_ROUNDINGS

    @pytest.mark.feature("static cache")
    def test_generation_with_a_static_cache(self, family):
        model, (ids, mask) = tiny_model(family), left_padded(12)
        patch_model(model)
        out = [
            model.generate(ids, attention_mask=mask, max_new_tokens=5, cache_implementation=kind, **GREEDY)
            for kind in ("static", "dynamic")
        ]
        assert torch.equal(*out)
        assert calls(model) == (2, {"kv_cache": 8})

    @pytest.mark.feature("chunked prefill")
    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("padded", [False, True])
    def test_a_long_continuation_runs_in_fp8(self, family, kind, padded):
        model, (ids, mask) = tiny_model(family), left_padded(150)
        mask = mask if padded else torch.ones_like(mask)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        exact = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
        patch_model(model)
        with torch.no_grad():
            cache = new_cache(kind, model)
            ours = in_chunks(model, ids, (70, CONTINUATION_ROWS, 16), cache, mask if padded else None)[mask.bool()]
        assert calls(model) == (2, {"kv_cache": 1})  # prompt, next turn | 16 rows
        assert relative(ours, exact) < OUTPUT_ERROR

    @pytest.mark.feature("chunked prefill")
    def test_a_continuation_is_the_same_attention(self, family):
        model, ids = tiny_model(family), tokens(1, 150)
        for backend, tolerance in same_attention().items():
            patch_model(model, backend=backend, fused_front_end=False)
            with torch.no_grad():
                whole = model(ids, use_cache=False).logits
                chunks = in_chunks(model, ids, (70, 80), DynamicCache(config=model.config))
            # a window's cache drops old keys, so tiles of the fused kernels start at other keys
            assert relative(chunks, whole) < (tolerance if family == "mistral-window" else FLIPPED_ROUNDINGS)

    @pytest.mark.feature("beam search")
    def test_beam_search(self, family):
        model, (ids, mask) = tiny_model(family), left_padded(12)
        patch_model(model)
        options = {"num_beams": 3, "max_new_tokens": 5, "output_scores": True, "return_dict_in_generate": True}
        beams = model.generate(ids, attention_mask=mask, **options, **GREEDY)
        assert calls(model) == (1, {"kv_cache": 4})
        with torch.no_grad():  # the scores of the second sequence, which has no padding, in one forward without a cache
            chosen = model(beams.sequences[1:, :-1], use_cache=False).logits[:, 11:].log_softmax(-1)
        score = chosen.gather(-1, beams.sequences[1:, 12:, None]).mean()
        assert abs(float(score - beams.sequences_scores[1])) < OUTPUT_ERROR * abs(float(score))

    @pytest.mark.feature("assisted generation")
    @pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
    def test_drafts_are_checked_as_decoding_would(self, family, how):
        model, ids = patch_model(tiny_model(family)), tokens(1, 6).repeat(1, 4)
        options = {**GREEDY, "eos_token_id": 2}  # transformers 4.57 looks drafts up only where there is an end
        plain = model.generate(ids, max_new_tokens=16, **options)
        before = calls(model)[0]
        draft = {"prompt_lookup_num_tokens": 4} if how == "prompt lookup" else {"assistant_model": tiny_model(family)}
        assisted = model.generate(ids, max_new_tokens=16, **draft, **options)
        assert torch.equal(assisted, plain)
        assert calls(model)[0] <= before + 1  # the prompt; transformers checks the first drafts in the same call

    @pytest.mark.feature("training with a cache")
    def test_training_with_a_cache_gives_the_same_bits(self, family):
        grads = []
        for use_cache in (True, False):
            model, ids = patch_model(tiny_model(family), fused_front_end=False).train(), tokens(2, 30)
            torch.manual_seed(3)  # dropout of GPT-2
            model(ids, labels=ids, use_cache=use_cache).loss.backward()
            assert calls(model) == (1, {})
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert relative(grads[0], grads[1]) < FLIPPED_ROUNDINGS


@pytest.mark.usefixtures("hardware_rounding")
class TestFrontEndAgainstCaches:
    """Calls that read a cache do not take the fused front end: apart from those that do by what is rounded elsewhere."""

    def patched(self, family, **options):
        model = tiny_model(family)
        if reason := triton_missing(model.device):
            pytest.skip(reason)
        return patch_model(model, backend="triton", **options)

    @pytest.mark.feature("static cache")
    @pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.gpu) for name in FAMILIES[1:])])
    def test_the_prompt_of_a_static_cache(self, family):
        model, (ids, mask) = self.patched(family), left_padded(12)
        with torch.no_grad():
            fused = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
            cached = model(ids, attention_mask=mask, past_key_values=new_cache("static", model), use_cache=True).logits
        assert [row["front_end_calls"] for row in geometry_report(model).rows] == [1, 1]
        assert relative(cached[mask.bool()], fused) < FUSED_RUNS

    @pytest.mark.gpu
    @pytest.mark.feature("chunked prefill")
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_continuation(self, family):
        model, ids = self.patched(family), tokens(1, 134)
        with torch.no_grad():
            fused = model(ids, use_cache=False).logits
            chunks = in_chunks(model, ids, (70, CONTINUATION_ROWS), DynamicCache(config=model.config))
        assert calls(model) == (3, {})
        assert [row["front_end_calls"] for row in geometry_report(model).rows] == [1, 1]
        assert relative(chunks, fused) < FUSED_RUNS

    @pytest.mark.gpu
    @pytest.mark.feature("training with a cache")
    @pytest.mark.parametrize("family", FAMILIES)
    def test_training(self, family):
        grads = []
        for use_cache, fused in ((True, True), (False, True), (True, False)):
            model, ids = self.patched(family, fused_front_end=fused).train(), tokens(2, 30)
            torch.manual_seed(3)  # dropout of GPT-2
            model(ids, labels=ids, use_cache=use_cache).loss.backward()
            assert [row["front_end_calls"] for row in geometry_report(model).rows] == [int(fused)] * 2
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert torch.equal(grads[0], grads[1])
        assert relative(grads[0], grads[2]) < FUSED_RUNS


@pytest.mark.gpu
@pytest.mark.feature("offloaded cache")
def test_an_offloaded_cache():
    model, ids = tiny_model("llama").cuda(), tokens(1, 150).cuda()
    exact = model(ids, use_cache=False).logits
    patch_model(model)
    with torch.no_grad():
        ours = in_chunks(model, ids, (70, 64, 16), new_cache("offloaded", model))
    assert calls(model) == (2, {"kv_cache": 1})
    assert relative(ours, exact) < OUTPUT_ERROR


class TestGenerate:
    @pytest.mark.feature("chunked prefill")
    def test_the_chunks_of_generate(self):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 150)
        out = model.generate(ids, max_new_tokens=3, prefill_chunk_size=CONTINUATION_ROWS, **GREEDY)
        assert out.shape == (1, 153)
        in_fp8, on_sdpa = calls(model)
        assert in_fp8 == 2  # 64 and 64
        assert on_sdpa in ({"kv_cache": 3}, {"kv_cache": 4})  # the remaining 22, in one or two calls, and two tokens

    @pytest.mark.feature("cache reuse")
    def test_a_second_turn_on_the_first_ones_cache(self):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 20)
        first = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
        turn = torch.cat([first.sequences, tokens(1, 80, seed=1)], dim=1)
        before = calls(model)[0]
        again = model.generate(turn, max_new_tokens=3, past_key_values=first.past_key_values, **GREEDY)
        assert calls(model)[0] == before + 1  # the 81 new tokens
        with torch.no_grad():
            logits = model(again[:, :-1], use_cache=False).logits[:, -3:]
        assert torch.equal(again[:, -3:], logits.argmax(-1))

    @pytest.mark.feature("autocast")
    def test_under_autocast(self):
        model, (ids, mask) = tiny_model("llama"), left_padded(12)
        options = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True, **GREEDY}
        exact = model.generate(ids, attention_mask=mask, **options)
        patch_model(model)
        with torch.autocast(model.device.type, dtype=torch.bfloat16), torch.inference_mode():
            ours = model.generate(ids, attention_mask=mask, **options)
        assert relative(ours.logits[0], exact.logits[0]) < OUTPUT_ERROR
        assert calls(model) == (1, {"kv_cache": 3})

    @pytest.mark.feature("output_attentions", refused=True)
    def test_attention_probabilities_are_refused(self):
        model = patch_model(tiny_model("llama"), fallback="sdpa")
        with pytest.raises((UnsupportedAttentionError, ValueError), match="attention"):
            model.generate(
                tokens(1, 8), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True, **GREEDY
            )

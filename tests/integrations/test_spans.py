"""Span scaling in patched models: what reaches dQ, dK and dV, which tokens make a sequence, and what is refused."""

import functools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from hf_geoscale import (
    SpanScaling,
    UnsupportedAttentionError,
    UnsupportedModelError,
    fp8_attention,
    geometry_report,
    patch_model,
    unpatch_model,
)
from hf_geoscale.integrations.front_end import FusedForward
from hf_geoscale.integrations.spans import sequences_of
from hf_geoscale.kernels import Visibility

from ..conftest import tiny_model, tokens
from ..stability.test_span import expected
from ..tolerances import FLOAT32_ROUNDOFF, GRADIENT_ERROR
from .compare import relative
from .test_packing import LENGTH, POSITIONS, lengths

SCALING = SpanScaling(2.0, 0.25)


@dataclass(frozen=True)
class Spy(SpanScaling):
    """Remembers the shape of every gradient it scaled."""

    seen: list[tuple[int, ...]] = field(default_factory=list, compare=False)

    def scale(self, grad: Tensor, x: Tensor) -> Tensor:
        self.seen.append(tuple(grad.shape))
        return super().scale(grad, x)


def train_step(model, ids: Tensor, **inputs) -> Tensor:
    """Gradient of all parameters, in one vector, after one backward."""
    model.zero_grad()
    model(**{"input_ids": ids, "labels": ids, "use_cache": False, **inputs}).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def projection_gradient(model, module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Output of a projection and the gradient that reached it, (B, L, …) each."""
    kept = []

    def keep(_module, _inputs, out):
        out.retain_grad()
        kept.append(out)

    handle = module.register_forward_hook(keep)
    train_step(model, ids)
    handle.remove()
    return kept[-1].detach(), kept[-1].grad


def heads_first(x: Tensor, dim: int = 16) -> Tensor:
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


class TestGradients:
    """The last layer gets the same gradient with and without, so its dQ, dK and dV can be scaled by hand."""

    def test_of_gpt2_are_the_scaled_ones(self):
        model, ids = tiny_model("gpt2"), tokens(2, 40)
        module = model.transformer.h[-1].attn.c_attn
        _, plain = projection_gradient(patch_model(model, fused_front_end=False), module, ids)
        out, scaled = projection_gradient(patch_model(model, span_scaling=SCALING), module, ids)
        for x, before, after in zip(*(t.split(64, dim=-1) for t in (out, plain, scaled)), strict=True):
            exact = expected(SCALING, heads_first(x), heads_first(before))
            assert relative(heads_first(after), exact) < 20 * FLOAT32_ROUNDOFF
            assert relative(after, before) > 0.1

    def test_of_a_grouped_value_are_the_scaled_ones(self):
        model, ids = tiny_model("llama"), tokens(2, 40)
        module = model.model.layers[-1].self_attn.v_proj
        _, plain = projection_gradient(patch_model(model, fused_front_end=False), module, ids)
        out, scaled = projection_gradient(patch_model(model, span_scaling=SCALING), module, ids)
        exact = expected(SCALING, heads_first(out), heads_first(plain))
        assert relative(heads_first(scaled), exact) < 20 * FLOAT32_ROUNDOFF

    @pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral-window"])
    def test_forward_and_the_identity_are_bit_identical(self, family):
        model, ids = patch_model(tiny_model(family), fused_front_end=False).train(), tokens(2, 40)
        torch.manual_seed(0)
        logits, plain = model(ids).logits, train_step(model, ids)
        torch.manual_seed(0)
        patch_model(model, span_scaling=SpanScaling(1.0, 1.0), fused_front_end=False)
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(train_step(model, ids), plain)
        torch.manual_seed(0)
        patch_model(model, span_scaling=SCALING)
        assert torch.equal(model(ids).logits, logits)
        assert relative(train_step(model, ids), plain) > 0.01

    def test_every_head_of_every_operand_and_layer(self):
        spy = Spy(2.0, 0.5)
        model = patch_model(tiny_model("llama"), span_scaling=spy)
        train_step(model, tokens(2, 40))
        assert sorted(spy.seen) == sorted([(2, 4, 40, 16), (2, 2, 40, 16), (2, 2, 40, 16)] * 2)
        with torch.no_grad():
            model(tokens(2, 40))
        assert len(spy.seen) == 6

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing(self, use_reentrant):
        grads = []
        for checkpoint in (False, True):
            model = patch_model(tiny_model("llama"), span_scaling=SCALING).train()
            if checkpoint:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            grads.append(train_step(model, tokens(2, 40)))
        assert torch.equal(*grads)

    def test_torch_compile(self):
        model, ids = patch_model(tiny_model("llama"), span_scaling=SCALING), tokens(2, 24)
        exact = train_step(model, ids)
        plain = train_step(patch_model(tiny_model("llama")), ids)
        torch._dynamo.reset()
        model.zero_grad()
        torch.compile(model, backend="eager")(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        ours = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert relative(ours, exact) < 1e-5 < relative(plain, exact)

    def test_autocast(self):
        grads, ids = [], tokens(2, 40)
        for autocast in (False, True):
            model = patch_model(tiny_model("llama"), span_scaling=SCALING)
            with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=autocast):
                grads.append(train_step(model, ids))
        plain = train_step(patch_model(tiny_model("llama")), ids)
        assert relative(grads[1], grads[0]) < GRADIENT_ERROR < relative(plain, grads[0])

    @pytest.mark.gpu
    def test_fused_kernels(self):
        model, ids = tiny_model("llama").cuda(), tokens(1, 40).cuda()
        exact = train_step(patch_model(model, span_scaling=SCALING, backend="reference"), ids)
        fused = train_step(patch_model(model, span_scaling=SCALING, backend="triton"), ids)
        plain = train_step(patch_model(model, span_scaling=None, backend="triton"), ids)
        assert relative(fused, exact) < GRADIENT_ERROR < relative(plain, exact)


class TestFrontEnd:
    """Fused forwards hand over raw projections: spans are those of rotated operands, divided."""

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_it_stays_out(self, family):
        model, ids = tiny_model(family), tokens(2, 40)
        patch_model(model, span_scaling=SCALING)
        exact = train_step(model, ids)
        row = geometry_report(model).rows[0]
        assert (row["front_end"], row["front_end_calls"]) == ("span scaling looks at rotated queries and keys", 0)
        patch_model(model, span_scaling=SCALING, fused_front_end=False)
        assert torch.equal(train_step(model, ids), exact)
        patch_model(model, span_scaling=SpanScaling(1.0, 1.0))
        assert geometry_report(model).rows[0]["front_end"] == "fused"
        assert torch.equal(train_step(model, ids), train_step(patch_model(model), ids))

    @pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
    def test_a_fused_forward_that_somebody_wrapped(self, family, monkeypatch):
        """It outlives patching anew; its calls are normalised, rotated and divided before their spans are taken."""
        model, ids = tiny_model(family), tokens(2, 40)
        exact = train_step(patch_model(model, span_scaling=SCALING), ids)
        plain = train_step(patch_model(model), ids)
        for module in list(model.modules()):
            if isinstance(module.__dict__.get("forward"), FusedForward):
                module.forward = functools.partial(module.forward)
        patch_model(model, span_scaling=SCALING)
        seen = []

        def spy(*operands, **options):
            seen.append((options["rotary"], options["qk_norm"], options["packed"]))
            return fp8_attention(*operands, **options)

        monkeypatch.setattr("hf_geoscale.integrations.attention.fp8_attention", spy)
        assert relative(train_step(model, ids), exact) < GRADIENT_ERROR < relative(plain, exact)
        assert seen == [(None, None, None)] * 2  # fused kernels send the gradient of a packed tensor past its views


class TestSequences:
    """Read off the mask: each is scaled as if it were alone."""

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, side):
        spy = Spy(2.0, 0.25)
        model, ids = patch_model(tiny_model("llama"), span_scaling=spy), tokens(2, 40)
        mask = torch.ones_like(ids)
        mask[0, slice(0, 9) if side == "left" else slice(31, 40)] = 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        labels = ids.masked_fill((mask == 0) | (positions == 0), -100)  # no padding predicts a first token
        padded = {"labels": labels, "attention_mask": mask, "position_ids": positions}
        batched = train_step(model, ids, **padded)
        assert {shape[1] for shape in spy.seen} == {31, 40}
        assert len(spy.seen) == 2 * 3 * 2
        counts, alone = (30, 39), 0.0  # tokens with a loss
        for row, count in zip(range(2), counts, strict=True):
            grad = train_step(model, ids[row, mask[row].bool()][None])
            alone = alone + grad * count / sum(counts)
        unscaled = train_step(patch_model(model, span_scaling=None), ids, **padded)
        assert relative(batched, alone) < GRADIENT_ERROR < relative(unscaled, alone)

    @pytest.mark.parametrize("how", ["positions", "lengths"])
    def test_packing(self, how):
        spy = Spy(2.0, 0.25)
        model, ids = patch_model(tiny_model("llama"), span_scaling=spy), tokens(1, LENGTH)
        train_step(model, ids, **({"position_ids": POSITIONS.to(ids.device)} if how == "positions" else lengths()))
        shapes = [shape for n in (15, 1, 24) for shape in ((4, n, 16), (2, n, 16), (2, n, 16))]
        assert sorted(spy.seen) == sorted(2 * shapes)

    def test_cached_prefix(self):
        """64 tokens with gradients after 8 without: their queries span alone, the keys with the past."""
        spy = Spy(2.0, 0.25)
        model, ids = patch_model(tiny_model("llama"), span_scaling=spy), tokens(1, 72)
        with torch.no_grad():
            past = model(ids[:, :8], use_cache=True).past_key_values
        train_step(model, ids[:, 8:], past_key_values=past, use_cache=True)
        assert sorted(spy.seen) == sorted(2 * [(1, 4, 64, 16), (1, 2, 72, 16), (1, 2, 72, 16)])

    def test_of_ranges(self):
        def sequences(ranges, keys=None, causal=False, window=None):
            ranges = torch.tensor(ranges)
            rows = ranges.shape[1]
            seen = Visibility(rows, keys or rows, causal, window, ranges)
            return sequences_of(seen, ranges.shape[0], torch.device("cpu"))

        padded = [[[0, 1], [0, 2], [0, 2]], [[1, 1], [1, 2], [1, 3]]]  # on the right, on the left
        assert sequences(padded) == (((0, 0, 2), (1, 1, 3)),) * 2
        assert sequences([[[0, 1], [0, 2], [2, 3], [2, 4]]]) == (((0, 0, 2), (0, 2, 4)),) * 2
        assert sequences([[[0, 2], [0, 2], [2, 4], [2, 4]]]) == (((0, 0, 2), (0, 2, 4)),) * 2  # not causal
        assert sequences([[[0, 1], [0, 2], [1, 3], [2, 4]]]) == (None, None)  # a sliding window
        assert sequences([[[0, 4]] * 4], causal=True, window=2) == (None, None)
        assert sequences([[[1, 4], [1, 5]]], keys=5) == (((0, 0, 2),), ((0, 1, 5),))  # a past, padded on the left
        assert sequences([[[0, 0], [0, 0]]]) == ((), ())
        assert sequences_of(Visibility(3, 3), 2, torch.device("cpu")) == (None, None)


class TestRefusals:
    def test_a_mask_with_holes_and_gradients(self):
        model, ids = patch_model(tiny_model("llama"), span_scaling=SCALING, fallback="sdpa"), tokens(1, 24)
        mask = torch.ones(24, 24).tril().bool()
        mask[:, 5] = False
        with torch.no_grad():
            assert model(ids, attention_mask=mask[None, None]).logits.isfinite().all()
        with pytest.raises(
            UnsupportedAttentionError, match=r"cannot tell the sequences of its mask .* span_scaling=None"
        ):
            model(ids, attention_mask=mask[None, None])
        patch_model(model, span_scaling=SpanScaling(1, 1), fallback="sdpa")
        train_step(model, ids, attention_mask=mask[None, None])

    def test_decoding_with_gradients(self):
        model, ids = patch_model(tiny_model("llama"), span_scaling=SCALING), tokens(1, 12)
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
        past = model(ids[:, :8], use_cache=True).past_key_values
        with pytest.raises(UnsupportedAttentionError, match="the sequences of 4 tokens after a cache of 8"):
            model(ids[:, 8:], past_key_values=past)

    def test_an_unsupported_model_even_with_a_fallback(self):
        model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
        patch_model(model, fallback="sdpa")
        unpatch_model(model)
        with pytest.raises(UnsupportedModelError):
            patch_model(model, fallback="sdpa", span_scaling=SCALING)

    def test_another_type(self):
        with pytest.raises(TypeError, match=r"span_scaling must be a SpanScaling, such as .*, or None, got \(2, 1\)"):
            patch_model(tiny_model("llama"), span_scaling=(2, 1))


def test_printed_and_replaced():
    model = patch_model(tiny_model("llama"), span_scaling=SCALING)
    assert "gradient spans × 2, 0.25" in str(model)
    patch_model(model, span_scaling=None)
    assert "gradient spans" not in str(model)

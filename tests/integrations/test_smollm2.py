"""A real pretrained model: SmolLM2-135M-Instruct on real English."""

import pytest
import torch

from benchmarks.gradient_error import NAMES, capture, measure
from benchmarks.model_error import compare, log_probabilities
from hf_geoscale import fp8_attention, geometry_report, patch_model, unpatch_model
from hf_geoscale.integrations import geoscale_layers

from ..tolerances import (
    FLOAT32_ROUNDOFF,
    FP8_OVER_BF16,
    SMOLLM2_GRADIENTS,
    SMOLLM2_KL,
    SMOLLM2_LOSS_GAP,
)
from .compare import relative, same_attention

pytestmark = pytest.mark.real_model


@pytest.fixture(autouse=True)
def leave_unpatched(smollm2):
    yield
    unpatch_model(smollm2[0])


@pytest.fixture(scope="module")
def exact(smollm2):
    """Log-probabilities (1, 1024, vocabulary) of the unpatched model."""
    model, ids = smollm2
    return log_probabilities(model, ids[:1])


def test_it_is_the_real_model(smollm2, exact):
    loss = -exact[:, :-1].gather(-1, smollm2[1][:1, 1:, None]).mean()
    assert loss < torch.log(torch.tensor(30.0))  # mis-permuted q and k give a perplexity of 145


def test_loss_kl_and_exact_undoing(smollm2, exact):
    model, ids = smollm2
    ids = ids[:1]
    before = log_probabilities(model, ids[:, :131])
    patch_model(model)
    gap, kl = compare(exact, log_probabilities(model, ids), ids)
    assert abs(gap) <= SMOLLM2_LOSS_GAP
    assert 0 < kl <= SMOLLM2_KL
    rows = geometry_report(model).rows
    assert sum(row["overflows"] for row in rows) == 0
    assert all(0.01 < row["utilisation"] < 1 for row in rows)
    assert all(row["calls"] == 1 and row["fallback_calls"] == 0 for row in rows)
    unpatch_model(model)
    assert torch.equal(log_probabilities(model, ids[:, :131]), before)


def test_later_tokens_do_not_change_one_bit_of_earlier_ones(smollm2):
    model, ids = smollm2
    patch_model(model)
    other = ids[:1, :260].clone()
    other[:, 140:] = ids[1:2, :120]
    a, b = (log_probabilities(model, x) for x in (ids[:1, :260], other))
    assert torch.equal(a[:, :140], b[:, :140])
    assert not torch.equal(a[:, 140:], b[:, 140:])


def test_batch_and_padding_do_not_change_a_row_of_attention(smollm2):
    """The same q, k, v alone, and in a batch behind 64 padding tokens: float round-off, which now and then flips a rounding; in the
    fused kernels also other running maxima."""
    model, ids = smollm2
    captured = capture(model, ids[:1, :192])
    model.zero_grad()
    patch_model(model)
    key_range = torch.stack([torch.full((256,), 64), torch.arange(256) + 1], dim=-1)
    everything = torch.stack([torch.zeros(256, dtype=torch.long), torch.arange(256) + 1], dim=-1)
    for layer in (0, 8, 20):
        operands = captured[layer][:3]
        state = geoscale_layers(model)[layer]
        scales = state.scaling.scales
        options = {f"{n}_quant_scale": getattr(scales, n) for n in "qkv"}
        generator = torch.Generator().manual_seed(0)
        padded = []
        for x in operands:
            other = torch.rand(2, x.shape[1], 256, 64, generator=generator) - 0.5
            other[0, :, 64:] = x[0]
            padded.append(other)
        visible = {"causal": False, "key_range": torch.stack([key_range, everything])}
        for backend, tolerance in same_attention().items():
            alone = fp8_attention(*operands, **options, backend=backend)
            batched = fp8_attention(*padded, **options, **visible, backend=backend)
            assert relative(batched[:1, :, 64:], alone) < tolerance


def test_batch_and_padding_redraw_only_the_rounding_noise(smollm2):
    """Through 30 layers, flipped roundings spread, as in any low-precision model: by no more than the noise itself."""
    model, ids = smollm2
    row = ids[:1, :192]
    padded = torch.cat([torch.cat([torch.zeros_like(row[:, :64]), row], dim=1), ids[1:2, :256]])
    mask = torch.ones_like(padded)
    mask[0, :64] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = []
    with torch.no_grad():
        for _ in range(2):
            padded_logits = model(padded, attention_mask=mask, position_ids=positions).logits[:1, 64:]
            logits.append((model(row).logits.log_softmax(-1), padded_logits.log_softmax(-1)))
            patch_model(model)
    (exact, exact_padded), (ours, ours_padded) = logits
    assert float((exact - exact_padded).norm() / exact.norm()) < 10 * FLOAT32_ROUNDOFF
    noise, change = compare(exact, ours, row), compare(ours, ours_padded, row)
    assert abs(change[0]) <= SMOLLM2_LOSS_GAP
    assert change[1] <= 1.5 * noise[1]


def test_gradients_at_the_published_level(smollm2):
    model, ids = smollm2
    table = measure(model, ids[:1, :512], layers=tuple(range(1, 30, 4)))
    model.zero_grad()
    mean = {name: dict(zip(NAMES, errors.mean(0).tolist(), strict=True)) for name, errors in table.items()}
    for name, limit in SMOLLM2_GRADIENTS.items():
        assert mean['FP8, precision="standard"'][name] <= limit
        assert mean['FP8, precision="high"'][name] < mean['FP8, precision="standard"'][name]
        assert mean["FP8, no Hadamard"][name] > mean['FP8, precision="standard"'][name]
        assert mean['FP8, precision="standard"'][name] <= FP8_OVER_BF16 * mean["BF16 attention"][name]

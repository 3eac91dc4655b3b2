"""The kernels of a refresh, on the GPU or in Triton's interpreter: certificates above float64's, and as in torch."""

import math
from dataclasses import replace

import pytest
import torch

from hf_geoscale.geometry import LayerMaps, Projection, measure_layers, start_vectors
from hf_geoscale.geometry import tensor_cores as tc
from hf_geoscale.geometry.batch import measure_maps
from hf_geoscale.geometry.certificates import ROUNDING_MARGIN
from hf_geoscale.geometry.spectral import SQUARINGS, gram_power_iteration

from .test_batch import draw, layer, mixed_layers
from .test_spectral import KINDS, matrices

kernels = pytest.importorskip("hf_geoscale.kernels.spectral", reason="needs Triton 3.4 or later", exc_type=ImportError)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.places_itself,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, of NaN and Inf
    pytest.mark.skipif(
        not kernels.takes(64, DEVICE), reason="needs Triton's interpreter, or a GPU that multiplies BF16"
    ),
]

SAME = 1e-5 if DEVICE.type == "cpu" else 1e-4
"""Relative difference of two bounds from the same operands, whose float32 sums have another order; matrix units truncate."""


def on_device(p: Projection) -> Projection:
    parts = {
        "weight": p.weight,
        "norm_gain": p.norm_gain,
        "norm_shift": p.norm_shift,
        "bias": p.bias,
        "excess": p.excess,
    }
    return replace(p, **{name: t.to(DEVICE) for name, t in parts.items() if t is not None})


def bounds(*maps: Projection) -> list[float]:
    """σ of each head by the kernels, without √d, factors and the margin for the rest of the way."""
    measured = measure_maps([on_device(p) for p in maps], "tensor cores", kernels)
    reach = [math.sqrt(p.weight.shape[2]) * p.rotary_factor for p in maps for _ in range(p.weight.shape[0])]
    return [float(b) / r / (1 + ROUNDING_MARGIN) for b, r in zip(measured.bound, reach, strict=True)]


def random_map(heads: int, dim: int, width: int, dtype: torch.dtype, gain_type: torch.dtype | None) -> Projection:
    gain = None if gain_type is None else (1 + draw(1, width)).to(gain_type)
    return Projection(draw(dim, heads, dim, width, dtype=dtype), gain)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    (64, 1100, BF16, BF16),
    (128, 96, FP32, FP32),
    (80, 130, FP16, FP16),
    (16, 2049, BF16, FP32),
    (96, 64, BF16, None),
    (16, 40, FP32, BF16),
]


@pytest.mark.parametrize(("dim", "width", "dtype", "gain_type"), CASES, ids=str)
def test_gram_matrices_and_certificates_are_those_of_torch(dim, width, dtype, gain_type):
    p = on_device(random_map(2, dim, width, dtype, gain_type))
    mine, theirs = measure_maps([p], "tensor cores", kernels), measure_maps([p], "tensor cores")
    error = (mine.grams.double() - theirs.grams.double()).flatten(1).norm(dim=1)
    trace = theirs.grams.diagonal(dim1=1, dim2=2).sum(1)
    assert (error <= 2 * tc.sum_error(width) * trace).all()
    torch.testing.assert_close(mine.bound, theirs.bound, rtol=SAME, atol=0)
    sigma = torch.linalg.svdvals(p.matrix().cpu())[:, 0].to(DEVICE)
    assert (mine.bound >= math.sqrt(width) * sigma * (1 + ROUNDING_MARGIN)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_enclose_float64(kind):
    """As in torch: from below σ by SVD, from above every allowance in full."""
    weight = matrices(kind, 2, 16, 96)
    p = Projection(weight.to(BF16 if kind == "random" else FP32), 1 + draw(1, 96), rotary_factor=1.25)
    sigma = torch.linalg.svdvals(p.matrix())[:, 0] / 1.25
    looseness = 16 ** (2.0 ** -(SQUARINGS + 1)) * math.sqrt(tc.half_looseness(16)) * 1.001
    frobenius = p.matrix().flatten(1).norm(dim=1) / 1.25
    allowed = looseness * sigma + (3 * 2.0**-8 + math.sqrt(tc.sum_error(96))) * frobenius + 2 * tc.UNDERFLOW
    for found, least, most in zip(bounds(p), sigma, allowed, strict=True):
        assert least <= found <= most


@pytest.mark.parametrize(("dtype", "gain_type"), [(BF16, BF16), (FP16, FP16), (FP32, FP32), (FP32, None)], ids=str)
def test_scaled_weights_are_rounded_as_in_torch(dtype, gain_type):
    """Rows of one entry: their Gram matrix is one exact product. Half of the products are ties or nearly."""
    p = on_device(random_map(3, 16, 1, dtype, gain_type))
    scaled = torch.empty(3, 16, 1, 1, dtype=BF16, device=DEVICE)
    tc.scaled_rows(p.weight, p.norm_gain, scaled)
    rows = scaled.flatten(2).float()
    out = torch.empty(3, 16, 16, device=DEVICE)
    kernels.grams([(p.weight, p.norm_gain, 0)], out, tc.SUM_WIDTH)
    torch.testing.assert_close(out, rows @ rows.mT, rtol=0, atol=0)


def test_products_beyond_the_range_of_float16():
    for weight, gain in ((2.0**-6, 2.0**-19), (300.0, 300.0)):
        p = Projection(torch.full((1, 16, 64), weight).half(), torch.full((64,), gain).half())
        assert 32 * weight * gain <= bounds(p)[0] <= 1.1 * 32 * weight * gain


def test_sums_are_cut_into_parts():
    """32 products of 2⁻³⁰ a tile make 2⁻²⁵, which a sum of 1 loses; the second 1,024 columns, apart, add up to 2⁻²¹."""
    weight = torch.full((1, 16, 2048), 2.0**-15, dtype=BF16, device=DEVICE)
    weight[..., 1::2] = 0
    weight[..., 0] = 1
    out = torch.empty(1, 16, 16, device=DEVICE)
    kernels.grams([(weight, None, 0)], out, tc.SUM_WIDTH)
    assert float(out[0, 0, 0]) >= 1 + 2.0**-21


def test_parts_longer_than_torchs_are_covered():
    """The kernel cuts 1,536 products into 1,024 and 512, torch into two of 768: the allowance is the longer part's.

    Products of 2⁻³⁰ vanish beside a 1 and add up where they are apart, which shows how many a sum takes. Of as many just below
    half an ulp, a unit that truncates would lose them all.
    """
    assert tc.partition(1536) == (2, 768)
    weight = torch.full((1, 16, 1536), 2.0**-15, dtype=BF16)
    weight[..., 1::2] = 0
    weight[..., 0] = 1
    summed = float(measure_maps([on_device(Projection(weight))], "tensor cores", kernels).grams[0, 0, 0])
    longest = 1536 - 2 * round((summed - 1) * 2**30)
    assert longest == 1024
    lost, rest = ((n * 1.999 * 2.0**-24) for n in (longest - 1, 1536 - longest))
    assert 0.9 * tc.sum_error(1536) <= lost / (1 + lost + rest) <= tc.sum_error(1536)


def test_every_allowance_reaches_the_certificate():
    down = Projection(torch.ones(1, 1, 64, dtype=BF16), torch.full((64,), 1 + 0.99 * 2.0**-8))  # to 1
    assert bounds(down)[0] >= 8 * (1 + 0.99 * 2.0**-8)
    lost = Projection(torch.full((1, 1, 64), 1e-25), torch.ones(64))  # σ² underflows
    assert bounds(lost)[0] >= 8e-25
    huge, beyond = (Projection(torch.full((1, rows, 64), 2.0**60)) for rows in (1, 4))
    assert 2.0**63 <= bounds(huge)[0] <= 1.1 * 2.0**63  # σ² = 2¹²⁶
    assert math.isnan(bounds(beyond)[0])  # entries of 2¹²⁶, a trace of 2¹²⁸


def test_nan_and_inf_stay_in_their_head():
    for value in (math.nan, math.inf):
        p = random_map(3, 16, 40, FP32, FP32)
        p.weight[1, 3, 3] = value
        assert [math.isfinite(b) for b in bounds(p, replace(p, weight=p.weight[:1]))] == [True, False, True, True]
        assert math.isnan(bounds(p)[1])


def test_layers_of_every_kind_are_as_in_torch():
    """With bias, shift, q/k norms (which stay with torch), GQA, an adapter, and a weight that lies in columns."""
    chosen = [mixed_layers()[i] for i in (3, 5, 7, 10)]
    flipped = layer(130)
    flipped = replace(flipped, key=replace(flipped.key, weight=flipped.key.weight.mT.contiguous().mT))
    chosen = [LayerMaps(*map(on_device, m.projections), m.softmax_scale) for m in (*chosen, flipped)]
    first = measure_layers(chosen, 2.0, arithmetic="tensor cores")
    warm = [replace(maps, vectors=g.vectors) for maps, g in zip(chosen, first, strict=True)]
    theirs = measure_layers(warm, 2.0, arithmetic="tensor cores")
    mine = measure_layers(warm, 2.0, arithmetic="tensor cores", kernels=kernels)
    for a, b in zip(mine, theirs, strict=True):
        for name in ("q_bound", "k_bound", "v_bound", "sigma_lower", "weight_drift"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=SAME, atol=0)


def test_wide_heads_and_float64_stay_with_torch(monkeypatch):
    monkeypatch.setattr(kernels, "grams", None)
    wide = LayerMaps(*[on_device(p) for p in layer(0, dim=256).projections], softmax_scale=1.0)
    (found,) = measure_layers([wide], arithmetic="tensor cores", kernels=kernels)
    assert found.q_bound.isfinite().all()
    narrow = LayerMaps(*[on_device(p) for p in layer(0).projections], softmax_scale=1.0)
    assert measure_layers([narrow], arithmetic="float64", kernels=kernels)[0].q_bound.isfinite().all()


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("dim", [16, 80])
def test_power_iteration_is_that_of_torch(dim, rounds):
    rows = draw(3, 6, dim, 50)
    gram_q, gram_k = ((a @ a.mT).to(DEVICE) for a in (rows[:4], rows[4:]))
    vectors = start_vectors(4, dim).float().to(DEVICE)
    mine = kernels.power_iteration(gram_q, gram_k, vectors, rounds)
    theirs = gram_power_iteration(gram_q, gram_k, vectors, rounds)
    torch.testing.assert_close(mine[0], theirs[0].double(), rtol=SAME, atol=0)
    torch.testing.assert_close(mine[1], theirs[1], rtol=SAME, atol=SAME)


def test_zero_weights_start_again_when_they_move():
    gram = torch.eye(16, device=DEVICE).expand(2, 16, 16).contiguous()
    sigma, stuck = kernels.power_iteration(0 * gram, gram, start_vectors(2, 16).float().to(DEVICE), 2)
    assert (sigma == 0).all()
    assert (kernels.power_iteration(gram, gram, stuck, 1)[0] > 0.99).all()


def test_large_gram_matrices_keep_their_vectors():
    """G_Q G_K z = 2⁷⁰, whose square is beyond float32."""
    gram = 2.0**35 * torch.eye(16, device=DEVICE)[None]
    sigma, following = kernels.power_iteration(gram, gram, torch.ones(1, 16, device=DEVICE) / 4, 1)
    assert float(sigma) == pytest.approx(2.0**35)
    torch.testing.assert_close(following.norm(), torch.ones((), device=DEVICE))


def test_a_steady_refresh_uploads_nothing():
    from hf_geoscale.kernels import gram

    p = on_device(random_map(2, 16, 40, FP32, FP32))
    measure_maps([p], "tensor cores", kernels)
    before = gram._table.cache_info().misses
    with torch.no_grad():
        p.weight.mul_(2)
    measure_maps([p], "tensor cores", kernels)
    assert gram._table.cache_info().misses == before
    measure_maps([replace(p, weight=p.weight.clone())], "tensor cores", kernels)
    assert gram._table.cache_info().misses == before + 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_large_layers_wait_for_nothing(dim, dtype):
    layers = [layer(seed, (8, 2), dim, 2048 + 8 * seed, dtype) for seed in range(3)]
    layers = [LayerMaps(*map(on_device, m.projections), softmax_scale=1.0) for m in layers]
    first = measure_layers(layers, kernels=kernels)
    warm = [replace(maps, vectors=g.vectors) for maps, g in zip(layers, first, strict=True)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = measure_layers(warm, kernels=kernels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for maps, mine, theirs in zip(warm, found, measure_layers(warm), strict=True):
        assert mine.vectors.dtype == torch.float32  # it was on tensor cores
        torch.testing.assert_close(mine.sigma_lower, theirs.sigma_lower, rtol=SAME, atol=0)
        for name, p in zip("qkv", maps.projections, strict=True):
            bound = getattr(mine, f"{name}_bound")
            torch.testing.assert_close(bound, getattr(theirs, f"{name}_bound"), rtol=SAME, atol=0)
            sigma = torch.linalg.svdvals(p.matrix())[:, 0]
            assert (bound >= math.sqrt(p.weight.shape[2]) * sigma * (1 + ROUNDING_MARGIN)).all()


@pytest.mark.parametrize(
    ("dim", "dtype", "kilobytes", "columns"),
    [
        (128, torch.bfloat16, 227, 128),
        (128, torch.float16, 163, 128),
        (128, torch.bfloat16, 99, 64),
        (64, torch.bfloat16, 99, 128),
        (80, torch.bfloat16, 99, 64),
        (64, torch.bfloat16, 64, 64),
        (128, torch.float32, 227, 64),
    ],
)
def test_as_many_columns_at_a_time_as_shared_memory_holds(dim, dtype, kilobytes, columns, monkeypatch):
    from hf_geoscale.kernels import gram

    monkeypatch.setattr(gram, "INTERPRETED", False)
    monkeypatch.setattr(gram, "_shared_memory", lambda device: kilobytes * 1024)
    assert gram.block_of(dim, dtype, torch.device("cuda")) == columns

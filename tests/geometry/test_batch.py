"""Layers measured together, and on tensor cores: the same bounds as one by one, never below float64's singular values."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_geoscale.geometry import LayerMaps, Projection, batch, gram, measure_layer, measure_layers, sigma_upper
from hf_geoscale.geometry import tensor_cores as tc
from hf_geoscale.geometry.batch import measure_maps
from hf_geoscale.geometry.certificates import ROUNDING_MARGIN, UNIT_ROUNDOFF, norm_bound
from hf_geoscale.geometry.spectral import SQUARINGS

from ..host_reads import no_host_reads
from .test_spectral import KINDS, matrices

BOUNDS = ("q_bound", "k_bound", "v_bound", "logit_bound", "sigma_lower")


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(seed: int, heads=(4, 2), dim=16, width=48, dtype=torch.float32, bias=False, factor=1.0) -> LayerMaps:
    maps = []
    for i, count in enumerate((heads[0], heads[1], heads[1])):
        weight, gain = draw(seed + i, count, dim, width, dtype=dtype), 1 + draw(seed + 5, width).to(dtype)
        offset = draw(seed + 7, count, dim).to(dtype) if bias else None
        maps.append(Projection(weight, gain, bias=offset, rotary_factor=factor if i < 2 else 1.0))
    return LayerMaps(*maps, softmax_scale=dim**-0.5)


def mixed_layers() -> list[LayerMaps]:
    """Shapes, dtypes and maps of every kind in one model."""
    local = [layer(10 * i) for i in range(3)]
    shift = layer(40, bias=True)
    shift = replace(shift, query=replace(shift.query, norm_shift=draw(3, 48)))
    normed = layer(50)
    normed = replace(
        normed, query=Projection.of_head_norm(1 + draw(1, 16), 4, 1.3), key=Projection.of_head_norm(draw(2, 16), 2)
    )
    adapted = layer(60)
    adapted = replace(adapted, value=replace(adapted.value, excess=draw(4, 2, 16).abs()))
    return [
        *local,
        layer(70, bias=True),
        layer(80, heads=(8, 2)),
        shift,
        layer(90, dim=32),
        normed,
        layer(100, dtype=torch.bfloat16, factor=1.2),
        layer(110, width=80),
        adapted,
        layer(120, heads=(4, 4), dtype=torch.float16),
    ]


@pytest.mark.parametrize("arithmetic", ["float64", "tensor cores"])
class TestTogether:
    def test_layers_of_every_shape_are_measured_as_alone(self, arithmetic):
        layers = mixed_layers()
        together = measure_layers(layers, headroom=2.0, interaction=True, arithmetic=arithmetic)
        # Sums in another order: float64 round-off, or float32 products on the same operands
        rtol = 1e-12 if arithmetic == "float64" else 1e-5
        for maps, found in zip(layers, together, strict=True):
            alone = measure_layer(*maps.projections, maps.softmax_scale, None, 2.0, True, arithmetic)
            for name in (*BOUNDS, "worst_case_logit", "weight_drift"):
                torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=rtol, atol=0)

    def test_groups_that_do_not_fit_are_cut(self, arithmetic, monkeypatch):
        layers = [layer(10 * i, bias=i % 2 == 0) for i in range(5)]
        whole = measure_layers(layers, arithmetic=arithmetic)
        monkeypatch.setattr("hf_geoscale.geometry.layer.GRAM_ENTRIES", 2 * 8 * 16**2)
        monkeypatch.setattr("hf_geoscale.geometry.batch.WORKSPACE", 48 * 16 * 5)
        for mine, theirs in zip(measure_layers(layers, arithmetic=arithmetic), whole, strict=True):
            for name in BOUNDS:
                torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-5, atol=0)

    def test_a_warm_start_finds_sigma(self, arithmetic):
        maps = layer(0, bias=True, factor=1.5)
        cold = measure_layer(*maps.projections, 1.0, arithmetic=arithmetic)
        warm = measure_layer(*maps.projections, 1.0, vectors=cold.vectors, arithmetic=arithmetic)
        q, k = (torch.cat([p.matrix(), p.offset()[..., None]], -1) for p in (maps.query, maps.key))
        exact = torch.linalg.svdvals(q.mT @ k.repeat_interleave(2, 0))[:, 0]
        rounded = 1e-9 if arithmetic == "float64" else 2 * UNIT_ROUNDOFF  # of the weights in BF16
        assert (warm.sigma_lower <= exact * (1 + rounded)).all()
        assert (warm.sigma_lower >= 0.98 * exact).all()

    def test_zero_weights_start_again_when_they_move(self, arithmetic):
        maps = layer(0)
        zero = replace(maps, query=replace(maps.query, weight=0 * maps.query.weight))
        stuck = measure_layer(*zero.projections, 1.0, arithmetic=arithmetic)
        assert (stuck.sigma_lower == 0).all()
        moved = measure_layer(*maps.projections, 1.0, vectors=stuck.vectors, arithmetic=arithmetic)
        assert (moved.sigma_lower > 1).all()

    def test_nan_and_inf_stay_in_their_layer(self, arithmetic):
        layers = [layer(0), layer(1), layer(2)]
        for index, value in ((0, math.nan), (2, math.inf)):
            layers[index].key.weight[1, 3, 3] = value
        found = measure_layers(layers, arithmetic=arithmetic)
        assert [bool(g.k_bound.isfinite().all()) for g in found] == [False, True, False]
        assert all(bool(g.q_bound.isfinite().all() and g.v_bound.isfinite().all()) for g in found)

    def test_operations_hardly_grow_with_the_layers(self, arithmetic):
        counts = []
        for layers in ([layer(i) for i in range(n)] for n in (2, 10)):
            vectors = [g.vectors for g in measure_layers(layers, arithmetic=arithmetic)]
            warm = [replace(maps, vectors=v) for maps, v in zip(layers, vectors, strict=True)]
            with torch.no_grad(), CountedOperations() as counted:
                measure_layers(warm, arithmetic=arithmetic)
            counts.append(counted.operations)
        per_layer = (counts[1] - counts[0]) / 8
        # Reading the weights: a scaled copy of each of q, k and v; in float64 also two casts and a Gram matrix each
        assert per_layer <= (3 if arithmetic == "tensor cores" else 15)

    def test_nothing_is_read_by_the_host(self, arithmetic):
        with no_host_reads():
            measure_layers(mixed_layers(), headroom=2.0, interaction=True, arithmetic=arithmetic)


class CountedOperations(TorchDispatchMode):
    """Counts dispatched operations that make new values."""

    VIEWS = (
        "view",
        "detach",
        "transpose",
        "slice",
        "split",
        "unbind",
        "select",
        "expand",
        "squeeze",
        "alias",
        "diagonal",
    )

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += not any(name in str(function) for name in self.VIEWS)
        return function(*args, **(kwargs or {}))


def test_the_spy_sees_a_read():
    with no_host_reads(), pytest.raises(AssertionError, match="the host reads a tensor"):
        bool(torch.ones(()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 64, 320), (2, 16, 2049)], ids=str)
def test_tensor_cores_enclose_the_certificate(kind, shape, dtype):
    """From below σ by SVD of W diag(g), and of the W that autocast casts to BF16; from above every allowance in full."""
    weight = matrices(kind, *shape)
    if dtype == torch.float16:
        weight = weight * min(1.0, 1e4 / float(weight.abs().amax().clamp_min(1e-300)))
    p = Projection(weight.to(dtype), (1 + draw(1, shape[2])).to(dtype), rotary_factor=1.25)
    bound = measure_layer(p, p, p, 1.0, arithmetic="tensor cores").q_bound / (1 + ROUNDING_MARGIN) / math.sqrt(shape[2])
    matrix = p.matrix()
    sigma = torch.linalg.svdvals(matrix)[:, 0]
    cast = torch.linalg.svdvals(replace(p, weight=p.weight.bfloat16()).matrix())[:, 0]
    assert (bound >= torch.maximum(sigma, cast)).all()
    looseness = shape[1] ** (2.0 ** -(SQUARINGS + 1)) * math.sqrt(tc.half_looseness(shape[1])) * 1.001
    frobenius = matrix.norm(dim=(-2, -1))
    allowed = looseness * sigma * (1 + UNIT_ROUNDOFF) + 3 * UNIT_ROUNDOFF * frobenius
    assert (bound <= allowed + math.sqrt(tc.sum_error(shape[2])) * frobenius + 2 * tc.UNDERFLOW).all()


def certificate(weight: torch.Tensor, gain: torch.Tensor) -> float:
    """√d·σ as the certificate of one head has it, on tensor cores and without the margin for the rest of the way."""
    p = Projection(weight, gain)
    return float(measure_maps([p], "tensor cores").bound[0]) / (1 + ROUNDING_MARGIN)


class TestAllowances:
    """Each by a case in which it is used up, so that the certificate would be too small without it."""

    def test_scaled_weights_that_all_round_down(self):
        weight, gain = torch.ones(1, 1, 64).bfloat16(), torch.full((64,), 1 + 0.99 * 2.0**-8)
        assert certificate(weight, gain) >= 64 * (1 + 0.99 * 2.0**-8)
        assert certificate(weight, gain) < 64 * (1 + 1.5 * 2.0**-8)

    def test_weights_that_round_up_when_they_run_and_down_when_they_are_measured(self):
        weight, gain = torch.full((1, 1, 64), 1 + 1.01 * 2.0**-8), torch.full((64,), 0.9999)
        assert certificate(weight, gain) >= 64 * float(weight.bfloat16()[0, 0, 0]) * 0.9999 > 64 * (1 + 1.9 * 2.0**-8)

    @pytest.mark.parametrize(("weight", "gain"), [(2.0**-6, 2.0**-19), (300.0, 300.0)])
    def test_products_beyond_the_range_of_float16(self, weight, gain):
        """Weights and gains in float16 whose products float16 would round away, or to infinity."""
        half, gains = torch.full((1, 16, 64), weight).half(), torch.full((64,), gain).half()
        bound = float(measure_maps([Projection(half, gains)], "tensor cores").bound)
        truth = float(torch.linalg.matrix_norm(half[0].double() * gains.double(), 2)) * 64**0.5
        assert truth <= bound <= 1.1 * truth

    def test_sums_that_are_cut_off(self, monkeypatch):
        exact = batch._coefficients
        monkeypatch.setattr(batch, "_coefficients", lambda p: (*exact(p)[:-1], 0.0))  # no cast of W or A
        monkeypatch.setattr(batch, "half_trace_power_bound", lambda g, *_: torch.linalg.matrix_norm(g.double(), 2))
        monkeypatch.setattr(batch, "products", lambda rows: torch.ones(len(rows), 1, 1))  # what is left of them
        weight = torch.full((1, 1, 1024), 1.4140625 * 2.0**-12).bfloat16()
        weight[..., 0] = 1
        assert certificate(weight, torch.ones(1024)) >= 32 * float(weight.double().norm()) > 32 * (1 + 5e-5)

    def test_products_that_underflow(self):
        assert certificate(torch.full((1, 1, 64), 1e-25), torch.ones(64)) >= 64e-25

    def test_gram_of_truncated_sums_is_covered(self):
        """Products added one by one in float32, each sum cut off below: what the worst matrix unit would do."""
        a = torch.full((1, 8, 512), 1.4140625 * 2.0**-12).bfloat16()  # products just below the last place of 1
        a[..., 0] = 1
        total = torch.zeros(1, 8, 8)
        for i in range(a.shape[-1]):
            exact = total.double() + (a[..., i : i + 1].double() @ a[..., i : i + 1].mT.double())
            total = torch.where(exact.float() > exact, torch.nextafter(exact.float(), torch.zeros(())), exact.float())
        error = (total.double() - gram(a)).norm()
        assert error <= tc.sum_error(512) * a.double().norm() ** 2
        assert error > 0.9 * tc.sum_error(512) * a.double().norm() ** 2

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dim", [1, 2, 64, 256])
    def test_trace_powers_in_half_precision_are_never_below(self, kind, dim):
        g = gram(matrices(kind, 2, dim, 2 * dim)).float()
        sigma = torch.linalg.svdvals(g.double())[:, 0]
        bound = tc.half_trace_power_bound(g) + tc.UNDERFLOW**2
        assert (bound >= sigma).all()
        assert (bound <= sigma * dim ** (2.0**-SQUARINGS) * tc.half_looseness(dim) * 1.001 + 2 * tc.UNDERFLOW**2).all()

    def test_the_allowance_for_half_precision_is_needed(self):
        """Without it a spectrum whose roundings all point down comes out too small."""
        generator, worst = torch.Generator().manual_seed(0), math.inf
        for _ in range(50):
            vector = torch.rand(64, 1, generator=generator)
            g = (vector @ vector.mT)[None]
            sigma = float(torch.linalg.svdvals(g.double())[0, 0])
            worst = min(worst, float(tc.half_trace_power_bound(g)) / tc.half_looseness(64) / sigma)
        assert worst < 1

    @pytest.mark.parametrize(
        ("width", "parts"), [(576, 1), (1024, 1), (4096, 4), (5120, 5), (1600, 2), (2049, 3), (1031, 1)]
    )
    def test_rows_are_cut_into_equal_parts(self, width, parts):
        assert tc.partition(width) == (parts, width // parts)


def test_the_certificate_formula_is_that_of_certificates():
    maps = layer(0, bias=True, factor=1.3)
    found = measure_layer(*maps.projections, 1.0)
    for p, bound in zip(maps.projections, (found.q_bound, found.k_bound, found.v_bound), strict=True):
        matrix = p.matrix()
        torch.testing.assert_close(bound, norm_bound(p, matrix, sigma_upper(gram(matrix))), rtol=1e-12, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tf32", [False, True], ids=["float32", "TF32"])
def test_large_layers_on_a_gpu(dtype, tf32, monkeypatch):
    """The matrix units' own sums stay within the allowance, and nothing waits for the device."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    layers = []
    for seed in range(3):
        maps = layer(seed, heads=(8, 2), dim=128, width=2048, dtype=dtype)
        on_gpu = [replace(p, weight=p.weight.cuda(), norm_gain=p.norm_gain.cuda()) for p in maps.projections]
        layers.append(LayerMaps(*on_gpu, softmax_scale=1.0))
    first = measure_layers(layers)
    warm = [replace(maps, vectors=g.vectors) for maps, g in zip(layers, first, strict=True)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = measure_layers(warm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = measure_layers(layers, arithmetic="float64")
    for maps, mine, theirs in zip(layers, found, exact, strict=True):
        assert mine.vectors.dtype == torch.float32  # it was on tensor cores
        for p, bound, double in zip(
            maps.projections,
            (mine.q_bound, mine.k_bound, mine.v_bound),
            (theirs.q_bound, theirs.k_bound, theirs.v_bound),
            strict=True,
        ):
            sigma = torch.linalg.svdvals(p.matrix())[:, 0]
            assert (bound >= math.sqrt(2048) * sigma * (1 + ROUNDING_MARGIN)).all()
            # With float32 weights a second cast to BF16, 2⁻⁸‖A‖_F/σ = 3.5 % at this shape; all else is below 2 %.
            assert (bound <= 1.08 * double).all()

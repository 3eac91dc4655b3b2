"""Span scaling against dense (L, L) projectors in float64."""

import pytest
import torch
from torch import Tensor

from hf_geoscale import SpanScaling, fp8_attention, scale_span_gradients
from hf_geoscale.stability.span import RIDGE_MIN, coefficients

from ..kernels.fused_cases import DEVICE, NEEDS_KERNELS
from ..tolerances import FLOAT32_ROUNDOFF, FLOAT64_ROUNDOFF

LENGTH, DIM = 53, 16


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parallel_part(grad: Tensor, x: Tensor, ridge: float) -> Tensor:
    return x @ coefficients(grad, x, ridge)


def projector(
    x: Tensor,  # (..., L, D)
    ridge: float,
) -> Tensor:
    """Π_X, dense: (..., L, L) float64, through the singular values of X."""
    u, sigma, _ = torch.linalg.svd(x.double(), full_matrices=False)
    ridged = sigma**2 + ridge * (sigma**2).sum(-1, keepdim=True) / x.shape[-1]
    return (u * (sigma**2 / ridged).nan_to_num()[..., None, :]) @ u.mT


def expected(scaling: SpanScaling, x: Tensor, grad: Tensor) -> Tensor:
    parallel = projector(x, scaling.ridge) @ grad.double()
    return scaling.a_parallel * parallel + scaling.a_perpendicular * (grad.double() - parallel)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def gradients(scaling: SpanScaling, operands: list[Tensor], grads: list[Tensor], **sequences) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    return list(torch.autograd.grad(scale_span_gradients(*leaves, scaling, **sequences), leaves, grads))


class TestProjector:
    @pytest.mark.parametrize("ridge", [RIDGE_MIN, 1e-4, 1.0, 1e4])
    @pytest.mark.parametrize("length", [LENGTH, DIM, 5, 1], ids=lambda n: f"L{n}")
    def test_dense(self, ridge, length):
        x, grad = randn(2, 3, length, DIM), randn(2, 3, length, DIM, seed=1)
        assert relative(parallel_part(grad, x, ridge), projector(x, ridge) @ grad) < FLOAT64_ROUNDOFF
        scaling = SpanScaling(1.75, 0.25, ridge=ridge)
        assert relative(scaling.scale(grad, x), expected(scaling, x, grad)) < FLOAT64_ROUNDOFF

    def test_limits_of_the_ridge(self):
        x, grad = randn(LENGTH, DIM), randn(LENGTH, DIM, seed=1)
        exact = x @ torch.linalg.lstsq(x, grad).solution
        errors = [relative(parallel_part(grad, x, ridge), exact) for ridge in (1e-2, 1e-3, 1e-4)]
        assert errors[0] > 9 * errors[1] > 81 * errors[2]  # first order in the ridge
        parts = [float(parallel_part(grad, x, ridge).norm()) for ridge in (1e4, 1e5)]
        assert parts[1] == pytest.approx(parts[0] / 10, rel=1e-2)

    def test_no_more_tokens_than_dimensions_leave_nothing_across(self):
        x, grad = randn(DIM // 2, DIM), randn(DIM // 2, DIM, seed=1)
        assert relative(parallel_part(grad, x, RIDGE_MIN), grad) < 10 * RIDGE_MIN

    def test_units_and_rotations_of_the_operand_do_not_matter(self):
        """So that softmax scales, quantisation scales and the Hadamard mix do not either."""
        x, grad = randn(LENGTH, DIM), randn(LENGTH, DIM, seed=1)
        rotation = torch.linalg.qr(randn(DIM, DIM, seed=2)).Q
        part = parallel_part(grad, x, 1e-2)
        for other in (1e-12 * x, 1e12 * x, x @ rotation):
            assert relative(parallel_part(grad, other, 1e-2), part) < FLOAT64_ROUNDOFF

    @pytest.mark.parametrize("length", [300, 2000, 5000])
    @pytest.mark.parametrize("rank", [0, 1, 3])
    @pytest.mark.parametrize("ridge", [RIDGE_MIN, 1e-4])
    def test_low_rank_in_float32(self, rank, ridge, length):
        """The hardest case for the factorisation: one eigenvalue of 256 mean ones, and zeros."""
        x, grad = randn(length, rank) @ randn(rank, 256, seed=1), randn(length, 8, seed=2)
        part = parallel_part(grad.float(), x.float(), ridge)
        exact = projector(x, ridge) @ grad
        assert part.isfinite().all()
        assert float((part - exact).norm() / grad.norm()) < 1e-3 * rank / 3 + 1e-9

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_low_precision(self, dtype):
        x, grad = randn(2, LENGTH, DIM, dtype=dtype), randn(2, LENGTH, DIM, seed=1, dtype=dtype)
        scaling = SpanScaling(1.5, 0.5)
        scaled = scaling.scale(grad, x)
        assert scaled.dtype == dtype
        # float32 inside for 16 bits on a GPU: the condition of XᵀX (about 10) times round-off; one rounding
        assert relative(scaled, expected(scaling, x, grad)) < 10 * FLOAT32_ROUNDOFF + torch.finfo(dtype).eps / 2


class TestFourParts:
    """The split of the logits' gradient, and what of it reaches dQ and dK."""

    @pytest.fixture(autouse=True)
    def split(self):
        self.q, self.k, self.grad = randn(LENGTH, DIM), randn(LENGTH, DIM, seed=1), randn(LENGTH, LENGTH, seed=2)
        along_q, along_k = projector(self.q, 0), projector(self.k, 0)
        across_q, across_k = torch.eye(LENGTH) - along_q, torch.eye(LENGTH) - along_k
        sides = {(i, j): (a, b) for i, a in enumerate((along_q, across_q)) for j, b in enumerate((along_k, across_k))}
        self.parts = {order: a @ self.grad @ b for order, (a, b) in sides.items()}

    def test_they_add_up_and_are_orthogonal(self):
        assert relative(sum(self.parts.values()), self.grad) < FLOAT64_ROUNDOFF
        squares = sum(float(part.norm() ** 2) for part in self.parts.values())
        assert squares == pytest.approx(float(self.grad.norm() ** 2))

    def test_query_gradients_see_two_of_them_and_key_gradients_the_mirrored_two(self):
        for unseen in ((0, 1), (1, 1)):
            assert float((self.parts[unseen] @ self.k).norm()) < FLOAT64_ROUNDOFF
        for unseen in ((1, 0), (1, 1)):
            assert float((self.parts[unseen].mT @ self.q).norm()) < FLOAT64_ROUNDOFF

    def test_scaling_needs_no_logit_gradient(self):
        """dQ and dK scaled token by token are those of the scaled parts of dS: order 0 along, one order 1 each across."""
        scaling = SpanScaling(1.75, 0.25, ridge=RIDGE_MIN)
        for x, other, grad, along, across in (
            (self.q, self.k, self.grad, self.parts[0, 0], self.parts[1, 0]),
            (self.k, self.q, self.grad.mT, self.parts[0, 0].mT, self.parts[0, 1].mT),
        ):
            exact = (1.75 * along + 0.25 * across) @ other
            assert relative(scaling.scale(grad @ other, x), exact) < 10 * RIDGE_MIN


class TestOperands:
    def operands(self, dtype=torch.float32, batch: int = 2) -> tuple[list[Tensor], list[Tensor]]:
        shapes = [(batch, heads, LENGTH, DIM) for heads in (4, 2, 2)]
        return [[randn(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)] for seed in (0, 3)]

    def test_forward_is_the_same_bits_and_gradients_are_scaled_per_head(self):
        operands, grads = self.operands()
        scaling = SpanScaling(2.0, 0.5)
        leaves = [x.clone().requires_grad_() for x in operands]
        out = scale_span_gradients(*leaves, scaling)
        assert all(torch.equal(a, b) for a, b in zip(out, operands, strict=True))
        for x, grad, ours in zip(operands, grads, torch.autograd.grad(out, leaves, grads), strict=True):
            assert relative(ours, expected(scaling, x, grad)) < 20 * FLOAT32_ROUNDOFF

    def test_each_sequence_has_its_own_span_and_padding_none(self):
        operands, grads = self.operands()
        scaling = SpanScaling(2.0, 0.0)
        sequences = ((0, 0, 20), (0, 20, LENGTH), (1, 3, 40))
        ours = gradients(scaling, operands, grads, query_sequences=sequences, key_sequences=sequences)
        for x, grad, found in zip(operands, grads, ours, strict=True):
            for row, start, stop in sequences:
                part = (row, slice(None), slice(start, stop))
                assert relative(found[part], expected(scaling, x[part], grad[part])) < 20 * FLOAT32_ROUNDOFF
            for padding in (slice(0, 3), slice(40, LENGTH)):
                assert torch.equal(found[1, :, padding], grad[1, :, padding])

    @pytest.mark.parametrize("target", ["q", "k", "v"])
    def test_targets(self, target):
        operands, grads = self.operands()
        ours = gradients(SpanScaling(2.0, 0.0, targets=(target,)), operands, grads)
        changed = "".join(n for n, a, b in zip("qkv", ours, grads, strict=True) if not torch.equal(a, b))
        assert changed == target

    def test_one_factor_for_both_parts_multiplies(self):
        operands, grads = self.operands()
        for ours, grad in zip(gradients(SpanScaling(2.0, 2.0), operands, grads), grads, strict=True):
            assert torch.equal(ours, 2 * grad)

    def test_nothing_to_scale_adds_nothing_to_the_graph(self):
        leaves = [x.requires_grad_() for x in self.operands()[0]]
        assert all(a is b for a, b in zip(scale_span_gradients(*leaves, SpanScaling(1.0, 1.0)), leaves, strict=True))
        with torch.no_grad():
            assert scale_span_gradients(*leaves, SpanScaling(2.0, 1.0))[0] is leaves[0]
        leaves[1] = leaves[1].detach()
        assert scale_span_gradients(*leaves, SpanScaling(2.0, 1.0))[1] is leaves[1]

    @pytest.mark.parametrize(
        ("backend", "dtype"),
        [
            *(("reference", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
            pytest.param("triton", torch.bfloat16, marks=NEEDS_KERNELS[0]),
        ],
    )
    def test_before_fp8_attention(self, backend, dtype):
        """Its own FP8 gradients, scaled: the same as scaling them by hand."""
        operands, grads = ([x.to(DEVICE) for x in group] for group in self.operands(dtype, batch=1))
        scaling = SpanScaling(1.5, 0.25)
        results = []
        for spans in (SpanScaling(1.0, 1.0), scaling):
            leaves = [x.clone().requires_grad_() for x in operands]
            q_scale, kv_scale = (torch.full((heads,), 100.0, device=DEVICE) for heads in (4, 2))
            given = {"q_quant_scale": q_scale, "k_quant_scale": kv_scale, "v_quant_scale": kv_scale, "backend": backend}
            out = fp8_attention(*scale_span_gradients(*leaves, spans), **given)
            results.append((out, *torch.autograd.grad(out, leaves, grads[0])))
        (plain_out, *plain), (out, *scaled) = results
        assert torch.equal(out, plain_out)
        for x, grad, ours in zip(operands, plain, scaled, strict=True):
            assert torch.equal(ours, scaling.scale(grad, x))
            assert relative(ours, grad) > 0.1

    def test_under_autocast(self):
        """A backward inside autocast still works in float32."""
        operands, grads = self.operands()
        exact = gradients(SpanScaling(2.0, 0.5), operands, grads)
        with torch.autocast(grads[0].device.type, dtype=torch.bfloat16):
            ours = gradients(SpanScaling(2.0, 0.5), operands, grads)
        assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))

    def test_second_derivatives_raise(self):
        leaves = [x.requires_grad_() for x in self.operands()[0]]
        out = scale_span_gradients(*leaves, SpanScaling(2.0, 0.5))[0]
        grad = torch.autograd.grad((out**2).sum(), leaves[0], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    @pytest.mark.gpu
    def test_float32_on_a_gpu_with_tf32(self):
        operands, grads = ([x.cuda() for x in group] for group in self.operands())
        operands[0] = (randn(2, 4, LENGTH, 1) @ randn(1, DIM, seed=1)).float().cuda()  # rank 1
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            ours = gradients(SpanScaling(2.0, 0.5), operands, grads)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        for x, grad, found in zip(operands, grads, ours, strict=True):
            assert relative(found.cpu(), expected(SpanScaling(2.0, 0.5), x.cpu(), grad.cpu())) < 20 * FLOAT32_ROUNDOFF


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"a_parallel": -1.0}, r"a_parallel must be a finite factor of at least 0, got -1\.0"),
            ({"a_perpendicular": float("nan")}, "a_perpendicular must be a finite factor of at least 0, got nan"),
            ({"a_parallel": float("inf")}, "a_parallel must be a finite factor of at least 0, got inf"),
            ({"ridge": 0.0}, r"ridge must be finite and at least 1e-05, got 0\.0"),
            ({"targets": ()}, r"targets must be one or more of \('q', 'k', 'v'\), each once, got \(\)"),
            ({"targets": "qk"}, "targets must be one or more of .*, got 'qk'"),
            ({"targets": ("q", "q")}, "each once"),
            ({"targets": ("q", "o")}, r"got \('q', 'o'\)"),
        ],
    )
    def test_bad_options(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            SpanScaling(**{"a_parallel": 1.0, "a_perpendicular": 1.0, **arguments})

    def test_one_target_or_a_list(self):
        assert SpanScaling(1, 1, targets="q") == SpanScaling(1, 1, targets=["q"]) != SpanScaling(1, 1)

    def test_shapes(self):
        x = randn(2, LENGTH, DIM)
        with pytest.raises(
            ValueError, match=r"query must be \(batch, heads, length, head_dim\), got shape \(2, 53, 16\)"
        ):
            scale_span_gradients(x, x, x, SpanScaling(2, 1))

    @pytest.mark.parametrize("bad", [(2, 0, 5), (0, 5, 5), (0, 50, 54), (0, 3, 9)])
    def test_sequences(self, bad):
        x = randn(2, 1, LENGTH, DIM)
        with pytest.raises(
            ValueError, match=r"sequences of key must be .* within 2 rows of 53 tokens, none empty and none"
        ):
            scale_span_gradients(x, x, x, SpanScaling(2, 1), key_sequences=((0, 0, 5), bad))

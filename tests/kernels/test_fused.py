"""The Triton kernels against the reference, feature by feature: on a GPU, or in Triton's interpreter at the same small sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import AttentionStatistics, Visibility, reference
from hf_geoscale.kernels.backend import resolve_backend, triton_missing

from ..tolerances import FLOAT32_ROUNDOFF, FUSED_ERROR, FUSED_LOGITS, MATRIX_UNIT_ERROR, OUTPUT_ERROR
from .test_reference import draw, exact, relative, scales

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    triton_missing(DEVICE) is not None, reason=f"the fused kernels cannot run: {triton_missing(DEVICE)}"
)
if triton_missing(DEVICE) is None:
    from hf_geoscale.kernels import fused


@pytest.fixture(autouse=True)
def hardware_rounding(monkeypatch):
    """Triton's interpreter truncates casts; round to nearest even there, and saturate in E4M3, as GPUs do."""
    if DEVICE.type == "cuda":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x, source, target, mode):
        if target not in (tl.float8e4nv, tl.bfloat16) or source == target:
            return convert(x, source, target, mode)
        wide = x if source == tl.float32 else convert(x, source, tl.float32, None)
        wide = torch.from_numpy(np.ascontiguousarray(wide).view(np.float32))
        if target == tl.bfloat16:
            return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return wide.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def ranges(kind: str, length: int) -> Tensor:
    """key_range of two sequences, (2, L, 2)."""
    rows = torch.arange(length)
    key_range = torch.zeros(2, length, 2, dtype=torch.int32)
    if kind == "padding":  # left, with empty rows, and right
        key_range[0, :, 0], key_range[0, :, 1] = 37, length
        key_range[1, :, 1] = length - 21
    else:  # packed in documents of 50 and of 33
        for sequence, document in enumerate((50, 33)):
            key_range[sequence, :, 0] = rows // document * document
            key_range[sequence, :, 1] = (rows // document + 1) * document
    return key_range


CASES = {
    "causal": {"batch": 2},
    "full": {"causal": False},
    "window": {"rows": 150, "window": 50},
    "window of one": {"window": 1},
    "more keys": {"rows": 40, "keys": 131},
    "more queries": {"rows": 97, "keys": 53},
    "prime length": {"rows": 131},
    "length 64": {"rows": 64},
    "multi-head": {"kv_heads": 2},
    "two groups": {"heads": 4, "kv_heads": 2},
    "multi-query": {"heads": 4},
    "more heads than run together": {"heads": 10, "kv_heads": 5, "rows": 40},
    "dim 16": {"dim": 16},
    "dim 80": {"dim": 80},
    "dim 96": {"dim": 96},
    "dim 128": {"dim": 128, "rows": 131},
    "dim 256": {"dim": 256},
    "no hadamard": {"incoherent": False},
    "high precision": {"precision": "high"},
    "high precision, dim 128": {"precision": "high", "dim": 128},
    "padding": {"ranges": "padding", "rows": 131},
    "packed": {"ranges": "packed", "rows": 131},
    "packed, not causal": {"ranges": "packed", "rows": 131, "causal": False},
    "dropout": {"dropout_p": 0.2, "dropout_seed": 2**40 + 7},
    "dropout, high precision, packed": {"dropout_p": 0.1, "dropout_seed": 3, "precision": "high", "ranges": "packed"},
    "quantised logits": {"logit_bound": 8.0},
    "quantised logits that overflow": {"logit_bound": 1.5, "batch": 2},
    "quantised logits, window": {"logit_bound": 8.0, "rows": 150, "window": 50},
    "quantised logits, high precision, dropout, packed": {
        **{"logit_bound": 8.0, "precision": "high", "ranges": "packed"},
        **{"dropout_p": 0.1, "dropout_seed": 3},
    },
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
}


def operands(case: dict) -> tuple[list[Tensor], dict]:
    """q, k, v over (B, L, H, D) memory, as Transformers hands them over, and the call's options with scales."""
    options = dict(case)
    shape = {n: options.pop(n) for n in ("batch", "rows", "keys", "heads", "kv_heads", "dim", "dtype") if n in options}
    default = {"batch": 2 if "ranges" in options else 1, "heads": 2, "kv_heads": 1, "dtype": torch.bfloat16}
    drawn = draw(**{**default, **shape})
    if drawn[0].dtype == torch.float32:
        drawn = [x.bfloat16().float() for x in drawn]  # what the kernels make of float32
    leaves = [x.detach().transpose(1, 2).contiguous().to(DEVICE).transpose(1, 2).requires_grad_() for x in drawn]
    if bound := options.pop("logit_bound", None):
        options["logit_quant_scale"] = torch.full((leaves[0].shape[1],), 448 / bound, device=DEVICE)
    if kind := options.pop("ranges", None):
        options["key_range"] = ranges(kind, leaves[0].shape[2]).to(DEVICE)
    return leaves, {**scales(*leaves), **options}


def run(leaves: list[Tensor], options: dict, backend: str = "triton") -> list[Tensor]:
    """O, dQ, dK, dV for one fixed dO."""
    out = fp8_attention(*leaves, **options, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def agree(mine: list[Tensor], theirs: list[Tensor], typical_logit: float = 0.0) -> bool:
    """Whether O, dQ, dK, dV differ by at most FUSED_ERROR, relative to each one's norm.

    Logits in the hundreds add what the matrix unit cuts off them: P̃, and with it everything, changes by that much.

    Where a row's dP − δ cancels (one visible key: dQ and dK are exactly 0) only the rounding of O in δ is left: 2⁻⁶ of ‖dV‖ is
    always granted as norm.
    """
    floor = 2.0**-6 * float(theirs[3].float().norm())
    allowed = FUSED_ERROR + (MATRIX_UNIT_ERROR * typical_logit if DEVICE.type == "cuda" else 0)
    return all(
        a.dtype == b.dtype and float((a.float() - b.float()).norm()) <= allowed * max(float(b.float().norm()), floor)
        for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("case", CASES)
class TestAgainstReference:
    """Laws of every feature."""

    def test_output_and_gradients(self, case):
        leaves, options = operands(CASES[case])
        assert agree(run(leaves, options), run(leaves, options, "reference"))


LONG_CASES = {
    "causal": {"rows": 1100},
    "full": {"rows": 900, "keys": 1100, "causal": False},
    "window": {"rows": 1100, "window": 300},
    "more keys": {"rows": 500, "keys": 1300},
    "more queries": {"rows": 1300, "keys": 500},
    "two groups": {"rows": 2100, "heads": 4, "kv_heads": 2},
    "padding": {"rows": 1100, "ranges": "padding"},
    "packed": {"rows": 700, "ranges": "packed"},
}
"""Several blocks of rows and keys, and more tiles than a ring holds."""


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: too long for the interpreter")
class TestManyTiles:
    @pytest.mark.parametrize("dim", [64, 80, 128])
    @pytest.mark.parametrize("case", LONG_CASES)
    def test_output_and_gradients(self, case, dim):
        leaves, options = operands({**LONG_CASES[case], "dim": dim})
        assert agree(run(leaves, options), run(leaves, options, "reference"))


@pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU, which has kernels of its own",
)
@pytest.mark.parametrize("case", CASES)
class TestPortableKernelsOnHopper:
    def test_output_and_gradients(self, case, monkeypatch):
        monkeypatch.setattr(fused.hopper, "launches_for", lambda *_, **__: None)
        leaves, options = operands(CASES[case])
        assert agree(run(leaves, options), run(leaves, options, "reference"))


def test_quantised_logits_are_counted_before_they_saturate():
    leaves, options = operands(CASES["quantised logits that overflow"])
    mine, theirs = AttentionStatistics(), AttentionStatistics()
    run(leaves, {**options, "statistics": mine})
    run(leaves, {**options, "statistics": theirs}, "reference")
    counts = theirs.overflows_by_operand
    assert counts.pop("logit gradient") == 0
    assert counts["logit"] > 100
    assert mine.overflows_by_operand == pytest.approx(
        counts, rel=2e-2
    )  # a few logits lie within round-off of the limit
    torch.testing.assert_close(mine.range_used["logit"], theirs.range_used["logit"], rtol=1e-2, atol=0)


@pytest.mark.parametrize("case", ["causal", "window", "padding", "high precision", "dropout", "dim 80"])
class TestStatistics:
    def test_ranges_overflows_and_logits(self, case):
        leaves, options = operands(CASES[case])
        mine, theirs = AttentionStatistics(observe_logits=True), AttentionStatistics(observe_logits=True)
        run(leaves, {**options, "statistics": mine})
        run(leaves, {**options, "statistics": theirs}, "reference")
        assert mine.overflows == theirs.overflows == 0
        for name in "qkv":
            torch.testing.assert_close(mine.range_used[name], theirs.range_used[name], rtol=1e-2, atol=0)
        torch.testing.assert_close(mine.logit_amax, theirs.logit_amax, rtol=FUSED_LOGITS, atol=0)


def poison(monkeypatch) -> None:
    """Fill every buffer the launches allocate with NaN."""

    def poisoned(make):
        def call(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.element_size() == 1:
                return x.view(torch.uint8).fill_(0x7F).view(x.dtype)
            return x.fill_(float("nan") if x.is_floating_point() else 2**30)

        return call

    monkeypatch.setattr(fused.torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(fused.torch, "empty_like", poisoned(torch.empty_like))


class TestBits:
    @pytest.mark.parametrize("case", ["causal", "more keys", "padding", "dim 80", "dropout", "high precision"])
    def test_two_runs_on_poisoned_memory_give_the_same_bits(self, case, monkeypatch):
        leaves, options = operands(CASES[case])
        first = run(leaves, options)
        with monkeypatch.context() as patch:
            poison(patch)
            second = run(leaves, options)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.isfinite(x).all() for x in first)

    @pytest.mark.parametrize("options", [{}, {"window": 40}, {"precision": "high"}], ids=str)
    def test_future_tokens_do_not_change_one_bit_of_the_past(self, options):
        leaves, options = operands({"rows": 150, **options})
        before = fp8_attention(*leaves, **options, backend="triton")
        with torch.no_grad():
            for x in leaves:
                x[:, :, 77:] *= -3
        after = fp8_attention(*leaves, **options, backend="triton")
        assert torch.equal(before[:, :, :77], after[:, :, :77])
        assert not torch.equal(before, after)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_changes_no_bit(self, reentrant):
        """Dropout's seed comes from torch's generator, which a checkpoint restores."""
        leaves, options = operands({"dropout_p": 0.2})

        def attend(*operands):
            return fp8_attention(*operands, **options, backend="triton")

        results = []
        for wrap in (lambda *x: attend(*x), lambda *x: checkpoint(attend, *x, use_reentrant=reentrant)):
            torch.manual_seed(9)
            for x in leaves:
                x.grad = None
            wrap(*leaves).square().sum().backward()
            results.append([x.grad for x in leaves])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class TestExtremes:
    @pytest.mark.parametrize("magnitude", [2.0**-40, 2.0**-12, 2.0**3, 2.0**20])
    def test_magnitudes(self, magnitude):
        """Logits in the hundreds and operands near zero.

        Without the mix, so that both quantise the same bits: one flipped rounding of q8 moves a logit of 500 by several units.
        """
        leaves, _ = operands({"rows": 192})
        leaves = [(x * magnitude).detach().requires_grad_() for x in leaves]
        options = {**scales(*leaves), "softmax_scale": 0.125 if magnitude < 2**20 else 2.0**-38, "incoherent": False}
        _, lse = fp8_attention(*leaves, **options, backend="reference", return_lse=True)
        assert agree(run(leaves, options), run(leaves, options, "reference"), float(lse.square().mean().sqrt()))

    @pytest.mark.parametrize("dim", [64, 128])
    def test_logits_are_as_exact_as_the_matrix_unit(self, dim):
        """With a window of one key, the log-sum-exp is a logit; channel 0 outweighs the others, which costs their last bits."""
        leaves, _ = operands({"rows": 192, "heads": 1, "dim": dim})
        with torch.no_grad():
            leaves[0][..., 0] *= 8
            leaves[1][..., 0] *= 8
        options = {**scales(*leaves), "window": 1, "softmax_scale": 1.0, "incoherent": False}
        _, lse = fp8_attention(*leaves, **options, backend="triton", return_lse=True)
        q, k = (
            (x.detach().float() * options[f"{name}_quant_scale"].view(-1, 1, 1)).to(torch.float8_e4m3fn).double()
            / options[f"{name}_quant_scale"].view(-1, 1, 1)
            for x, name in zip(leaves[:2], "qk", strict=True)
        )
        exact_logits = (q * k).sum(-1)
        allowed = MATRIX_UNIT_ERROR if DEVICE.type == "cuda" else FLOAT32_ROUNDOFF
        assert relative(lse.double(), exact_logits) < allowed

    def test_logits_of_a_hundred_thousand_stay_finite(self):
        leaves, _ = operands({"rows": 192})
        leaves = [(x * 2.0**7).detach().requires_grad_() for x in leaves]
        results = run(leaves, scales(*leaves))
        assert all(torch.isfinite(x).all() for x in results)
        assert float(results[0].float().norm(dim=-1).amax()) < 1.1 * float(leaves[2].float().norm(dim=-1).amax())

    def test_padded_rows_with_logits_far_below_minus_88(self):
        """L % 128 == 64 with padding: where cuDNN's BF16 backward gives NaN."""
        leaves, options = operands({"batch": 2, "rows": 192})
        with torch.no_grad():
            leaves[0].copy_(-leaves[1].repeat_interleave(2, 1) * 8)  # each row's own key gets about −8·64·softmax_scale
        options |= scales(*leaves) | {"softmax_scale": 1.0, "key_range": ranges("padding", 192).to(DEVICE)}
        _, lse = fp8_attention(*leaves, **options, backend="triton", return_lse=True)
        first_seen = lse[0, :, 37]
        assert float(first_seen.max()) < -88
        mine, theirs = run(leaves, options), run(leaves, options, "reference")
        assert all(torch.isfinite(x).all() for x in mine)
        assert agree(mine, theirs)

    def test_one_token_takes_everything(self):
        """Adversarial: key 3 wins every row by a wide margin, so O is its value and P̃ is 1 or 0."""
        leaves, options = operands({"rows": 100, "causal": False})
        with torch.no_grad():
            leaves[0].copy_(torch.ones_like(leaves[0]))
            leaves[1][:, :, 3] = 40.0
        options |= scales(*leaves)
        out = fp8_attention(*leaves, **options, backend="triton")
        expected = leaves[2][:, :, 3:4].repeat_interleave(2, 1).expand_as(out)
        assert relative(out, expected) < OUTPUT_ERROR

    def test_zeros(self):
        leaves = [torch.zeros(1, 2, 70, 64, device=DEVICE, requires_grad=True) for _ in range(3)]
        one = torch.ones(2, device=DEVICE)
        results = run(leaves, {f"{n}_quant_scale": one for n in "qkv"})
        assert all(torch.isfinite(x).all() for x in results)
        assert float(results[0].abs().max()) == 0

    @pytest.mark.parametrize("zero", ["q and k", "v", "gradient", "everything"])
    def test_zeros_under_the_scales_of_zero_weights(self, zero):
        """Weights that are all zero have scales of 448·2⁶⁰ and more: products of their descales leave float32."""
        leaves, options = operands({"rows": 70})
        grad = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(5)).to(leaves[0]) * 1e-5
        with torch.no_grad():
            for i, name in enumerate("qkv"):
                if zero == "everything" or name in zero.split():
                    leaves[i].zero_()
                    options[f"{name}_quant_scale"] = torch.full_like(options[f"{name}_quant_scale"], 448 * 2.0**70)
            if zero in ("gradient", "everything"):
                grad.zero_()
        results = {}
        for backend in ("triton", "reference"):
            out = fp8_attention(*leaves, **options, backend=backend)
            results[backend] = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        assert all(torch.isfinite(x).all() for x in results["triton"])
        assert agree(results["triton"], results["reference"])

    @pytest.mark.parametrize("options", [{}, {"window": 50}, {"causal": False}], ids=str)
    def test_scales_that_change_between_groups_of_rows(self, options, monkeypatch):
        """dO a thousand times larger in one group and zero in another; groups of 128 rows, the most that one tile takes."""
        monkeypatch.setattr(fused, "GRADIENT_ROWS", 128)
        monkeypatch.setattr(reference, "GRADIENT_ROWS", 128)
        leaves, options = operands({"rows": 400, **options})
        grad = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(5)).to(leaves[0])
        grad[:, :, 128:256] *= 1000
        grad[:, :, 256:384] = 0
        results = []
        for backend in ("triton", "reference"):
            out = fp8_attention(*leaves, **options, backend=backend)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
        assert agree(*results)


class TestOp:
    def test_second_derivatives_are_refused(self):
        leaves, options = operands({"rows": 40})
        out = fp8_attention(*leaves, **options, backend="triton")
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(out.sum(), leaves, create_graph=True)

    def test_dropout_seeds_of_every_kind(self):
        leaves, options = operands({"rows": 40, "dropout_p": 0.3})
        seeds = (2**64 - 5, -5, torch.tensor(-5), torch.tensor(-5, dtype=torch.int32))
        outs = [fp8_attention(*leaves, **options, dropout_seed=seed, backend="triton") for seed in seeds]
        assert all(torch.equal(out, outs[0]) for out in outs)
        assert relative(outs[0], fp8_attention(*leaves, **options, dropout_seed=-5, backend="reference")) < FUSED_ERROR

    def test_log_sum_exp(self):
        leaves, options = operands({"rows": 131, "keys": 131, "ranges": "padding"})
        _, lse = fp8_attention(*leaves, **options, backend="triton", return_lse=True)
        q, k, _ = (x.detach().double().cpu() for x in leaves)
        visible = Visibility(131, 131, True, None, ranges("padding", 131)).dense(torch.device("cpu"))
        logits = (q @ k.repeat_interleave(2, 1).mT / 8).masked_fill(~visible, float("-inf"))
        torch.testing.assert_close(lse.cpu().double(), logits.logsumexp(-1), rtol=0, atol=0.15)
        assert lse.dtype == torch.float32
        assert not lse.requires_grad

    def test_against_exact_attention(self):
        leaves, options = operands({"rows": 131})
        out = fp8_attention(*leaves, **options, backend="triton")
        visible = Visibility(131, 131).dense(torch.device("cpu"))
        assert relative(out.cpu(), exact(*(x.detach().cpu() for x in leaves), visible, 0.125)) < OUTPUT_ERROR

    def test_compiles_whole_and_does_not_recompile_for_new_scales(self):
        leaves, options = operands({})
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph.forward

        def attend(q, k, v, q_scale, k_scale, v_scale):
            names = {"q_quant_scale": q_scale, "k_quant_scale": k_scale, "v_quant_scale": v_scale}
            return fp8_attention(q, k, v, **names, backend="triton") * 2

        compiled = torch.compile(attend, fullgraph=True, backend=count)
        for factor in (1.0, 0.5, 0.25):
            given = [scale * factor for scale in options.values()]
            assert torch.equal(compiled(*leaves, *given), attend(*leaves, *given))
        assert len(graphs) == 1

    @pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
    def test_gradients_through_a_compiled_graph(self, compiler):
        leaves, options = operands({})
        eager = run(leaves, options)
        torch._dynamo.reset()
        attend = torch.compile(
            lambda *x: fp8_attention(*x, **options, backend="triton"), fullgraph=True, backend=compiler
        )
        out = attend(*leaves)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
        compiled = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))

    def test_registration(self):
        leaves, options = operands({"rows": 40})
        arguments = (*leaves, *options.values(), None, None, None, None, 0.125, True, 0, 0.0, True, False, True, False)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(fused.attention_forward, arguments, test_utils=checks)

    def test_autocast_changes_nothing(self):
        leaves, options = operands({})
        eager = run(leaves, options)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            inside = run(leaves, options)
        assert all(torch.equal(a, b) for a, b in zip(eager, inside, strict=True))

    @pytest.mark.gpu
    def test_cuda_graph(self):
        leaves, options = operands({"rows": 200})
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run(leaves, options)
        torch.cuda.synchronize()
        grad = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(5)).to(leaves[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fp8_attention(*leaves, **options, backend="triton")
            captured = [out, *torch.autograd.grad(out, leaves, grad)]
        for _ in range(2):  # the second time on other operands
            for x in captured:
                x.detach().fill_(float("nan"))
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(run(leaves, options), captured, strict=True))
            with torch.no_grad():
                leaves[2].mul_(0.5)

    @pytest.mark.parametrize(("kv_heads", "share"), [(1, 0.72), (4, 0.65)], ids=["4:1", "multi-head"])
    @pytest.mark.parametrize("dim", [64, 128])
    def test_memory_kept_for_the_backward(self, kv_heads, share, dim):
        """Against q, k, v, O in BF16 and the log-sum-exp, which BF16 attention keeps."""
        sizes = []
        leaves, options = operands({"rows": 256, "heads": 4, "kv_heads": kv_heads, "dim": dim})
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            fp8_attention(*leaves, **options, backend="triton")
        q, k, v = leaves
        assert sum(sizes) <= share * (2 * q.nbytes + k.nbytes + v.nbytes + q[..., 0].numel() * 4)

    @pytest.mark.gpu
    def test_matches_sdpa_at_length_4096(self):
        leaves, options = operands({"rows": 4096, "dim": 128})
        mine = run(leaves, options)
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
        theirs = [out, *torch.autograd.grad(out, leaves, grad)]
        assert relative(mine[0], theirs[0]) < 1.5 * OUTPUT_ERROR
        assert all(relative(a, b) < 2.5 * OUTPUT_ERROR for a, b in zip(mine[1:], theirs[1:], strict=True))


class TestBackend:
    def test_auto_takes_the_kernels_on_a_gpu_only(self):
        assert resolve_backend("auto", DEVICE) == ("triton" if DEVICE.type == "cuda" else "reference")
        assert resolve_backend("reference", DEVICE) == "reference"

    def test_a_device_without_fp8_is_named(self, monkeypatch):
        monkeypatch.setattr("hf_geoscale.kernels.backend.INTERPRETED", False)
        with pytest.raises(RuntimeError, match=r'backend="triton" cannot run: they need an NVIDIA GPU.*\'cpu\''):
            resolve_backend("triton", torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
        with pytest.raises(RuntimeError, match=r"NVIDIA A100 \(compute capability 8.0\) has no FP8 matrix unit"):
            resolve_backend("triton", torch.device("cuda"))
        assert resolve_backend("auto", torch.device("cuda")) == "reference"

    def test_missing_triton_is_named(self, monkeypatch):
        monkeypatch.setattr("hf_geoscale.kernels.backend.TRITON_INSTALLED", False)
        with pytest.raises(RuntimeError, match=r"Triton 3.4 or later is not installed"):
            resolve_backend("triton", torch.device("cuda"))

    def test_unknown_backend_is_named(self):
        with pytest.raises(ValueError, match=r"backend must be one of .*'cudnn'"):
            resolve_backend("cudnn", DEVICE)

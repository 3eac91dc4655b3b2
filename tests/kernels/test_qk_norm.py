"""RMS norms of q and k inside the op: the same attention, and the same gradients, as of operands that were normalised before."""

import functools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import Visibility
from hf_geoscale.kernels.backend import triton_missing
from hf_geoscale.kernels.qk_norm import QKNorm, normalise_and_rotate, rms_norm

from ..tolerances import BF16_LOSSES, FUSED_ERROR, GRADIENT_ERROR, OUTPUT_ERROR
from .fused_cases import DEVICE, NEEDS_KERNELS, agree, operands
from .samples import exact, relative, scales
from .test_fused import poison
from .test_rotary import angles

if triton_missing(DEVICE) is None:
    from hf_geoscale.kernels import fused

EPS = 0.01  # of the size of the raw keys' mean squares


def weights(dim: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Weights of the norms of q and of k, (D,) leaves."""
    generator = torch.Generator().manual_seed(3)
    return [(1 + 0.3 * torch.randn(dim, generator=generator)).to(DEVICE, dtype).requires_grad_() for _ in range(2)]


CASES = {
    "qwen3": {},
    "partial rope, two groups, float32 weights": {
        **{"rotary": {"turned": 24}, "heads": 4, "kv_heads": 2, "norm": torch.float32},
    },
    "interleaved, dim 80": {"rotary_interleaved": True, "dim": 80},
    "no rope": {"rotary": None},
    "dim 128, prime length, batch": {"dim": 128, "rows": 131, "batch": 2},
    "dim 128, many chunks": {"dim": 128, "rows": 1061},
    "dim 256": {"dim": 256},
    "float16, no hadamard": {"dtype": torch.float16, "norm": torch.float16, "incoherent": False},
    "dropout, high precision": {"dropout_p": 0.2, "dropout_seed": 7, "precision": "high"},
    "float32": {"dtype": torch.float32, "norm": torch.float32},
}
IN_THE_INTERPRETER = list(CASES)[:3]  # it takes a second for each


def drawn(name: str) -> tuple[list[Tensor], dict]:
    """Leaves q, k, v and the norms' weights, and options; raw queries and keys are far from unit mean square."""
    given = dict(CASES[name])
    turned, norm_dtype = given.pop("rotary", {}), given.pop("norm", torch.bfloat16)
    leaves, options = operands({"rows": 40, **given})
    with torch.no_grad():
        leaves[0] *= 4
        leaves[1] *= 0.1
    length, dim = leaves[0].shape[2:]
    leaves += weights(dim, norm_dtype)
    if turned is not None:
        options["rotary"] = angles(length, **{"turned": dim, **turned})
    return leaves, {**options, **scales(*prepared(leaves, options))}


def norm_of(leaves: list[Tensor]) -> QKNorm:
    return (*leaves[3:], EPS)


def prepared(leaves: list[Tensor], options: dict) -> list[Tensor]:
    """Queries and keys after norm and RoPE, and values."""
    rotary, interleaved = options.get("rotary"), options.get("rotary_interleaved", False)
    return [*normalise_and_rotate(*leaves[:2], norm_of(leaves), rotary, interleaved), leaves[2]]


def without_front(options: dict) -> dict:
    return {name: option for name, option in options.items() if not name.startswith("rotary")}


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """O and the gradients of the leaves for one fixed dO."""
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def run(leaves: list[Tensor], options: dict, backend: str) -> list[Tensor]:
    out = fp8_attention(*leaves[:3], **options, qk_norm=norm_of(leaves), backend=backend)
    return gradients(out, leaves)


@functools.cache
def plain_run() -> list[Tensor]:
    """The case "qwen3" by the kernels."""
    return run(*drawn("qwen3"), "triton")


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


class TestSpecification:
    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_what_qwen3_does(self, dtype, weight_dtype):
        x = 3 * torch.randn(2, 5, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        norm = Qwen3RMSNorm(32, EPS).to(weight_dtype)
        norm.weight = torch.nn.Parameter(weights(32, weight_dtype)[0].detach().cpu())
        mine, theirs = rms_norm(x, norm.weight, EPS), norm(x)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)

    @pytest.mark.parametrize("case", [case for case in CASES if "chunks" not in case])
    def test_reference_is_that_of_prepared_operands(self, case):
        leaves, options = drawn(case)
        mine = run(leaves, options, "reference")
        out = fp8_attention(*prepared(leaves, options), **without_front(options), backend="reference")
        assert same(mine, gradients(out, leaves))

    @pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.gpu)])
    def test_against_exact_attention(self, backend):
        """Float64 autograd through norm and attention, without RoPE."""
        leaves, options = drawn("no rope")
        wide = [x.detach().double().cpu().requires_grad_() for x in leaves]
        q, k = (
            w * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() for x, w in zip(wide[:2], wide[3:], strict=True)
        )
        out = exact(q, k, wide[2], Visibility(40, 40).dense(torch.device("cpu")), 0.125)
        theirs = gradients(out, wide)
        mine = [x.cpu() for x in run(leaves, options, backend)]
        assert relative(mine[0], theirs[0]) < OUTPUT_ERROR
        errors = [relative(a, b) for a, b in zip(mine[1:], theirs[1:], strict=True)]
        assert max(errors) < GRADIENT_ERROR


class TestFused:
    pytestmark = NEEDS_KERNELS

    @pytest.mark.parametrize(
        "case",
        [
            case if case in IN_THE_INTERPRETER else pytest.param(case, marks=pytest.mark.gpu)
            for case in CASES
            if case != "float32"  # the reference keeps it after the norm, where the kernels round to bfloat16
        ],
    )
    def test_agrees_with_the_reference(self, case):
        leaves, options = drawn(case)
        assert agree(run(leaves, options, "triton"), run(leaves, options, "reference"))

    @pytest.mark.parametrize(
        "case", ["no rope", pytest.param("partial rope, two groups, float32 weights", marks=pytest.mark.gpu)]
    )
    def test_operands_are_those_of_prepared_inputs(self, case):
        """The kernels round where the specification does, so the forward differs by float32 round-off that flips few roundings."""
        leaves, options = drawn(case)
        leaves = [x.detach() for x in leaves]
        leaves[3:] = [torch.stack([w, -w], 1)[:, 0] for w in leaves[3:]]  # stride 2: kernels read them as arrays
        mine = fp8_attention(*leaves[:3], **options, qk_norm=norm_of(leaves), backend="triton")
        before = prepared(leaves, options)
        theirs = fp8_attention(*before, **without_front(options), backend="triton")
        assert relative(mine, theirs) < FUSED_ERROR / 4

    def test_packed(self):
        """One gradient for all three operands holds what each would get."""
        leaves, options = drawn("qwen3")
        packed = torch.cat([x.detach().transpose(1, 2).flatten(2) for x in leaves[:3]], 2).requires_grad_()
        views = packed.unflatten(2, (-1, 64)).transpose(1, 2).split((2, 1, 1), dim=1)
        out = fp8_attention(*views, packed=packed, **options, qk_norm=norm_of(leaves), backend="triton")
        out, grad, *norms = gradients(out, [packed, *leaves[3:]])
        grads = grad.unflatten(2, (-1, 64)).transpose(1, 2).split((2, 1, 1), dim=1)
        assert same([out, *grads, *norms], plain_run())

    def test_a_run_on_poisoned_memory_gives_the_same_bits(self, monkeypatch):
        first = plain_run()
        poison(monkeypatch)
        second = run(*drawn("qwen3"), "triton")
        assert same(first, second)
        assert all(torch.isfinite(x).all() for x in first)

    @pytest.mark.gpu
    @pytest.mark.parametrize("case", ["dim 128, prime length, batch", "dim 128, many chunks"])
    def test_two_runs_give_the_same_bits(self, case):
        assert same(*(run(*drawn(case), "triton") for _ in range(2)))

    def test_future_tokens_do_not_change_one_bit_of_the_past(self):
        leaves, options = drawn("qwen3")
        before, *_ = plain_run()
        with torch.no_grad():
            for x in leaves[:3]:
                x[:, :, 27:] += 3
            after = fp8_attention(*leaves[:3], **options, qk_norm=norm_of(leaves), backend="triton")
        assert torch.equal(before[:, :, :27], after[:, :, :27])
        assert not torch.equal(before, after)

    def test_checkpointing_changes_no_bit(self):
        leaves, options = drawn("qwen3")

        def attend(q, k, v, q_weight, k_weight):
            return fp8_attention(q, k, v, **options, qk_norm=(q_weight, k_weight, EPS), backend="triton")

        out = checkpoint(attend, *leaves, use_reentrant=False)
        assert same(gradients(out, leaves), plain_run())

    @pytest.mark.parametrize("frozen", [(3,), pytest.param((0, 1, 2), marks=pytest.mark.gpu)], ids=str)
    def test_what_is_frozen_gets_no_gradient(self, frozen):
        leaves, options = drawn("qwen3")
        for i in frozen:
            leaves[i].requires_grad_(False)
        wanted = [i for i in range(5) if i not in frozen]
        out = fp8_attention(*leaves[:3], **options, qk_norm=norm_of(leaves), backend="triton")
        _, *grads = gradients(out, [leaves[i] for i in wanted])
        assert same(grads, [plain_run()[1:][i] for i in wanted])

    def test_saves_the_operands_as_they_came(self):
        """Of their size: q8, k8 and v8, O, and q and k in bfloat16 without a copy."""
        leaves, options = drawn("qwen3")
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            out = fp8_attention(*leaves[:3], **options, qk_norm=norm_of(leaves), backend="triton")
        large = [x for x in kept if x.dim() == 4 and x.numel() > 0]
        assert sorted(str(x.dtype) for x in large) == 3 * ["torch.bfloat16"] + 3 * ["torch.float8_e4m3fn"]
        pointers = {x.data_ptr() for x in large if x.dtype == torch.bfloat16}
        assert pointers == {out.data_ptr(), leaves[0].data_ptr(), leaves[1].data_ptr()}

    @pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
    def test_gradients_through_a_compiled_graph(self, compiler):
        leaves, options = drawn("qwen3")
        torch._dynamo.reset()
        attend = torch.compile(
            lambda q, k, v, *w: fp8_attention(q, k, v, **options, qk_norm=(*w, EPS), backend="triton"),
            fullgraph=True,
            backend=compiler,
        )
        *operand_grads, q_grad, k_grad = gradients(attend(*leaves), leaves)
        *others, q_other, k_other = plain_run()
        assert same(operand_grads, others)
        for mine, theirs in ((q_grad, q_other), (k_grad, k_other)):  # inductor sums over blocks in another order
            assert torch.equal(mine, theirs) if compiler == "aot_eager" else relative(mine, theirs) < BF16_LOSSES

    def test_registration(self):
        leaves, options = drawn("qwen3")
        constants = (*(options[f"{x}_quant_scale"] for x in "qkv"), *4 * (None,), *options["rotary"])
        numbers = (False, 0.125, 0.0, True, 0, 0.0, True)
        forward = (*leaves[:3], *constants, *numbers, False, True, False, *norm_of(leaves))
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(fused.attention_forward, forward, test_utils=checks)
        saved = [x.detach() for x in fused.attention_forward(*forward)[:8]]
        given = [x.detach() for x in leaves]
        for packed in (False, True):
            dtypes = 3 * (torch.bfloat16,)
            backward = (saved[0], *saved, *constants, *numbers, packed, *dtypes, *given[:2], *norm_of(given))
            torch.library.opcheck(fused.attention_backward, backward, test_utils="test_faketensor")


class TestArguments:
    @pytest.mark.parametrize(
        ("given", "error", "said"),
        [
            ((torch.ones(32), torch.ones(64), EPS), ValueError, r"weight of q must be of shape \(64,\), got \(32,\)"),
            ((torch.ones(64), torch.ones(1, 64), EPS), ValueError, r"weight of k must be .*got \(1, 64\)"),
            ((torch.ones(64), torch.ones(64, dtype=torch.int64), EPS), TypeError, r"weight of k .*torch\.int64"),
            ((torch.ones(64, device="meta"), torch.ones(64), EPS), ValueError, "weight of q is on meta"),
            ((torch.ones(64), torch.ones(64), 0.0), ValueError, r"epsilon must be positive.*got 0\.0"),
            ((torch.ones(64), torch.ones(64), float("nan")), ValueError, "got nan"),
        ],
    )
    def test_are_checked(self, given, error, said):
        leaves, options = operands({"rows": 20})
        given = [x.to(DEVICE) if isinstance(x, Tensor) and x.device.type != "meta" else x for x in given]
        with pytest.raises(error, match=said):
            fp8_attention(*leaves, **options, qk_norm=tuple(given), backend="reference")

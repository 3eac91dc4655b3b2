"""The fused kernels as an op: autograd, compilation, autocast, CUDA graphs, memory; and which backend runs where."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import AttentionStatistics, Visibility
from hf_geoscale.kernels.backend import resolve_backend, triton_missing

from ..tolerances import FUSED_ERROR, OUTPUT_ERROR
from .fused_cases import DEVICE, NEEDS_KERNELS, operands, ranges, run
from .samples import exact, relative, scales

pytestmark = NEEDS_KERNELS
if triton_missing(DEVICE) is None:
    from hf_geoscale.kernels import fused


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

    def test_tensors_behind_the_operands_get_their_gradients(self):
        """The same bits as through views of them, in one node of autograd."""
        rows = [torch.randn(2, 20, heads * 16, device=DEVICE, dtype=torch.bfloat16) for heads in (2, 1, 1)]
        weights = [torch.randn(16, device=DEVICE).requires_grad_(wanted) for wanted in (True, False)]
        options = scales(*(x.view(2, 20, -1, 16).transpose(1, 2).cpu() for x in rows))
        options = {name: x.to(DEVICE) for name, x in options.items()} | {"qk_norm": (*weights, 1e-6)}
        found = []
        for behind in (False, True):
            leaves = [x.clone().requires_grad_() for x in rows]
            views = [x.view(2, 20, -1, 16).transpose(1, 2) for x in leaves]
            out = fp8_attention(*views, **options, packed=tuple(leaves) if behind else None, backend="triton")
            found.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, weights[0]])])
        nodes = [node for node, _ in found[1][0].grad_fn.next_functions if node is not None]
        assert {type(node).__name__ for node in nodes} == {"AccumulateGrad"}
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*found, strict=True))

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

    @pytest.mark.parametrize("rotary", [False, True], ids=["rotated before", "rotary"])
    @pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
    def test_registration(self, rotary, packed):
        """Schema and autograd of the forward, fake tensors of both ops; test_schema multiplies its inputs, which FP8 cannot."""
        leaves, options = operands({"rows": 40})
        angles = torch.rand(2, 1, 40, 32, generator=torch.Generator().manual_seed(6)).to(DEVICE)
        cos, sin = angles if rotary else (None, None)
        constants = (*options.values(), None, None, None, None, cos, sin)
        numbers = (False, 0.125, 0.0, True, 0, 0.0, True)  # interleaved, …, incoherent
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        forward = (*leaves, *constants, *numbers, False, True, False)
        torch.library.opcheck(fused.attention_forward, forward, test_utils=checks)
        saved = [x.detach() for x in fused.attention_forward(*forward)[:8]]
        backward = (saved[0], *saved, *constants, *numbers, packed, *3 * (leaves[0].dtype,))
        torch.library.opcheck(fused.attention_backward, backward, test_utils="test_faketensor")

    def test_a_dispatch_mode_sees_both_ops(self):
        """Without one the passes run past the dispatcher, to the same bits."""
        seen = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        leaves, options = operands({"rows": 40})
        alone = run(leaves, options)
        with Watch():
            watched = run(leaves, options)
        ops = torch.ops.hf_geoscale
        assert [seen.count(op.default) for op in (ops.fp8_attention, ops.fp8_attention_backward)] == [1, 1]
        assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))

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

    def test_scales_of_any_stride(self):
        """One scale expanded to all heads is a single number in memory: read as an array it would end there."""
        leaves, options = operands({"rows": 48})
        heads = {f"{name}_quant_scale": x.shape[1] for name, x in zip("qkv", leaves, strict=True)}
        others = torch.full((8,), 3.0, device=DEVICE)  # what lies behind the one number
        others[0] = options["q_quant_scale"].amin()
        expanded = options | {name: others[:1].expand(count) for name, count in heads.items()}
        copied = options | {
            name: x.clone(memory_format=torch.contiguous_format) for name, x in expanded.items() if name in heads
        }
        assert all(torch.equal(a, b) for a, b in zip(run(leaves, copied), run(leaves, expanded), strict=True))

    @pytest.mark.parametrize("limit", [2**31 - 1, 2**63 - 1])
    def test_limits_that_limit_nothing(self, limit):
        """Common spellings of "no window" and "to the end", which 32 bits do not hold."""
        leaves, options = operands({"rows": 70})
        plain = run(leaves, options)
        key_range = torch.tensor([0, limit]).expand(leaves[0].shape[0], 70, 2).to(DEVICE)
        for given in ({"window": limit}, {"key_range": key_range}):
            assert all(torch.equal(a, b) for a, b in zip(run(leaves, options | given), plain, strict=True))

    def test_one_statistics_with_and_without_quantised_logits(self):
        leaves, options = operands({"rows": 48})
        statistics = AttentionStatistics()
        logit_scale = torch.full((leaves[0].shape[1],), 1e4, device=DEVICE)
        for given in ({}, {"logit_quant_scale": logit_scale}, {}):
            fp8_attention(*leaves, **options, **given, statistics=statistics, backend="triton")
        assert statistics.overflows_by_operand["logit"] > 0
        assert statistics.overflows_by_operand["q"] == 0

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
        with pytest.raises(RuntimeError, match=r'backend="triton" cannot run: the kernels need an NVIDIA GPU.*\'cpu\''):
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

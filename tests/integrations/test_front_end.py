"""The fused front end: raw projections go to the kernels, and nothing but round-off tells."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from hf_geoscale import geometry_report, patch_model
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.kernels.backend import triton_missing

from ..conftest import tiny_model, tokens
from ..kernels.conftest import hardware_rounding  # noqa: F401 - a fixture
from ..tolerances import FLIPPED_ROUNDINGS, FUSED_ERROR
from .compare import relative

FUSED = ["llama", "llama-bias-yarn", "mistral", "mistral-window", "qwen2", "qwen3", "gpt2", "gpt2-inverse-layer"]


def step(model, ids: torch.Tensor, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and all gradients as one vector."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False, **inputs)
    out.loss.backward()
    return out.logits.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def attention_of(model):
    return geoscale_layers(model)[0].site.attention


def norms_of(model) -> list[Qwen3RMSNorm]:
    """Norms of q and k, layer by layer."""
    return [m for name, m in model.named_modules() if name.endswith((".q_norm", ".k_norm"))]


@pytest.mark.feature("fused front end")
class TestAgainstTheInterface:
    @pytest.mark.parametrize("family", FUSED)
    def test_results_are_those_of_the_interface_path(self, family):
        model, ids = tiny_model(family), tokens(2, 40)
        logits, grads = step(patch_model(model, backend="reference", fused_front_end=False), ids)
        fused_logits, fused_grads = step(patch_model(model, backend="reference", fused_front_end=True), ids)
        assert relative(fused_logits, logits) < FLIPPED_ROUNDINGS
        assert relative(fused_grads, grads) < 4 * FLIPPED_ROUNDINGS  # of six rounded factors instead of two
        assert [row["front_end_calls"] for row in geometry_report(model).rows] == [1, 1]

    @pytest.mark.usefixtures("hardware_rounding")
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
    def test_kernels_agree_too(self, family):
        model, ids = tiny_model(family), tokens(1, 33)
        if reason := triton_missing(ids.device):
            pytest.skip(reason)
        logits, grads = step(patch_model(model, backend="triton", fused_front_end=False), ids)
        fused_logits, fused_grads = step(patch_model(model, backend="triton", fused_front_end=True), ids)
        assert relative(fused_logits, logits) < FUSED_ERROR
        assert relative(fused_grads, grads) < 2 * FUSED_ERROR

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_masks_reach_it(self, family):
        model, ids = tiny_model(family), tokens(2, 40)
        mask = torch.ones_like(ids)
        mask[0, :9] = mask[1, 30:] = 0
        plain = patch_model(model, backend="reference", fused_front_end=False)(ids, attention_mask=mask).logits
        fused = patch_model(model, backend="reference")(ids, attention_mask=mask, use_cache=False).logits
        seen = mask.bool()
        assert relative(fused[seen], plain[seen]) < FLIPPED_ROUNDINGS

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
    def test_calls_that_go_to_sdpa_are_rotated_first(self, family):
        model, ids = tiny_model(family), tokens(1, 40)
        holes = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
        holes[..., 5:, 2] = False
        bias = torch.zeros(holes.shape).masked_fill(~holes, torch.finfo(torch.float32).min)
        plain = model(ids, attention_mask=bias).logits
        patch_model(model, backend="reference", fallback="sdpa")
        torch.testing.assert_close(model(ids, attention_mask=bias, use_cache=False).logits, plain)
        assert [row["front_end_calls"] for row in geometry_report(model).rows] == [0, 0]


class Operations(TorchDispatchMode):
    """Names of the operations that wrote tensors as large as the keys; views write none."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if any(x.numel() >= self.numel and x.untyped_storage().data_ptr() not in inputs for x in tensors):
            self.names.append(function.overloadpacket.__name__)
        return result


LENGTH = 32


@functools.cache
def run_between(family: str, norm_dtype: torch.dtype | None) -> tuple[list[str], list[torch.Tensor]]:
    """What wrote large tensors, forward and backward of one bfloat16 attention; and what autograd kept."""
    model = tiny_model(family).bfloat16().train()
    if norm_dtype is not None:
        for norm in norms_of(model):
            norm.to(norm_dtype)
    patch_model(model, backend="triton")
    if reason := triton_missing(model.device):
        pytest.skip(reason)
    attention = attention_of(model)
    for module in attention.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    hidden = torch.randn(1, LENGTH, 64, dtype=torch.bfloat16).requires_grad_()
    arguments = {"attention_mask": None}
    if family != "gpt2":
        arguments["position_embeddings"] = model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    attention(hidden, **arguments)  # measures the weights
    kept: list[torch.Tensor] = []
    keys = LENGTH * 2 * 16
    with (
        Operations(keys) as operations,
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        out, _ = attention(hidden, **arguments)
        grad = torch.ones_like(out)
        out.backward(grad)
    return operations.names, kept


@pytest.mark.usefixtures("hardware_rounding")
class TestNothingStandsBetween:
    """Between projections and kernels, forward and backward, no pass over memory is left."""

    @pytest.mark.parametrize(
        ("family", "norm_dtype"),
        [
            *((family, None) for family in ("llama", "mistral", "qwen2", "qwen3", "gpt2")),
            pytest.param("qwen3", torch.float32, marks=pytest.mark.gpu),
        ],
    )
    def test_no_elementwise_operation(self, family, norm_dtype):
        names, _ = run_between(family, norm_dtype)
        products = {"mm", "addmm", "fp8_attention", "fp8_attention_backward"}
        assert [name for name in names if name not in products] == ["ones_like"]

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_the_backward_keeps_no_rotated_operand(self, family):
        """FP8 operands, O in BF16, and what the projections keep anyway: hidden states, weights and (o_proj's input) O."""
        _, kept = run_between(family, None)
        operands = [x for x in kept if x.dim() == 4 and x.numel() >= LENGTH * 2 * 16]
        assert sorted(str(x.dtype) for x in operands) == ["torch.bfloat16"] + 3 * ["torch.float8_e4m3fn"]

    def test_norms_add_what_the_projections_gave_for_q_and_k(self):
        """In BF16, uncopied; no float32 and nothing that was normalised."""
        _, kept = run_between("qwen3", None)
        large = [x for x in kept if x.dim() == 4 and x.numel() >= LENGTH * 2 * 32]
        assert sorted(str(x.dtype) for x in large) == 3 * ["torch.bfloat16"] + 3 * ["torch.float8_e4m3fn"]
        assert not [x for x in kept if x.dtype == torch.float32 and x.numel() >= LENGTH * 2 * 32]

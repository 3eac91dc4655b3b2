"""The fused front end: raw projections go to the kernels, and nothing but round-off tells."""

import copy
import functools
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from hf_geoscale import geometry_report, patch_model, unpatch_model
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.front_end import FusedForward
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
        assert [row["fused_calls"] for row in geometry_report(model).rows] == [1, 1]

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
        assert [row["fused_calls"] for row in geometry_report(model).rows] == [0, 0]


@pytest.mark.feature("fused front end")
class TestWhichCalls:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_cache_takes_the_original_forward(self, family):
        model, ids = tiny_model(family), tokens(1, 70)
        interface = patch_model(model, fused_front_end=False).generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(patch_model(model).generate(ids, max_new_tokens=4, do_sample=False), interface)
        assert geometry_report(model).rows[0]["fused_calls"] == 0

    def test_other_scalings_keep_to_the_interface(self):
        model = patch_model(tiny_model("llama"), scaling="delayed")
        assert "forward" not in attention_of(model).__dict__
        assert "delayed" in geometry_report(model).rows[0]["front_end"]

    @pytest.mark.parametrize("wraps", [False, True])
    def test_a_replaced_forward_is_left_alone(self, monkeypatch, wraps):
        def forward(self, *args, **kwargs):
            return original(self, *args, **kwargs)

        original = LlamaAttention.forward
        monkeypatch.setattr(LlamaAttention, "forward", functools.wraps(original)(forward) if wraps else forward)
        model = patch_model(tiny_model("llama"))
        assert "forward" not in attention_of(model).__dict__
        assert geometry_report(model).rows[0]["front_end"] == f"{__name__} replaced its forward"

    @pytest.mark.parametrize("wraps", [False, True])
    def test_a_wrapped_instance_is_left_alone_and_kept(self, wraps):
        model, ids, seen = tiny_model("llama"), tokens(1, 20), []
        attention = next(m for m in model.modules() if isinstance(m, LlamaAttention))
        original = attention.forward

        def forward(*args, **kwargs):
            seen.append(1)
            return original(*args, **kwargs)

        attention.forward = functools.wraps(original)(forward) if wraps else forward
        given = attention.forward
        patch_model(model)(ids, use_cache=False)
        assert "wrapped or replaced its forward" in geometry_report(model).rows[0]["front_end"]
        assert unpatch_model(model).model.layers[0].self_attn.forward is given
        assert len(seen) == 1

    def test_an_accelerate_hook_keeps_running(self):
        from accelerate.hooks import ModelHook, add_hook_to_module

        class Count(ModelHook):
            calls = 0

            def pre_forward(self, module, *args, **kwargs):
                Count.calls += 1
                return args, kwargs

        model, ids = tiny_model("llama"), tokens(1, 20)
        add_hook_to_module(model.model.layers[0].self_attn, Count())
        patch_model(model)(ids, use_cache=False)
        unpatch_model(model)(ids, use_cache=False)
        assert Count.calls == 2

    def test_a_hook_removed_later_leaves_nothing_that_stops_another_patch(self):
        from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

        model = patch_model(tiny_model("llama"))
        attention = attention_of(model)
        add_hook_to_module(attention, ModelHook())
        unpatch_model(model)
        remove_hook_from_module(attention)
        assert geometry_report(patch_model(model)).rows[0]["front_end"] == "fused"
        assert "forward" not in attention_of(model).__dict__ or isinstance(attention_of(model).forward, FusedForward)

    def test_another_rotation_is_noticed(self, monkeypatch):
        def apply_rotary_pos_emb(q, k, cos, sin, **_):
            return q, k

        monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", apply_rotary_pos_emb)
        model = patch_model(tiny_model("llama"))
        assert geometry_report(model).rows[0]["front_end"] == f"{__name__} replaced apply_rotary_pos_emb"

    @pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2"])
    def test_a_window_is_that_of_the_class(self, family):
        """A config may carry a sliding_window that its class does not use."""
        model, ids = tiny_model(family), tokens(1, 40)
        model.config.sliding_window = 9
        interface = patch_model(model, backend="reference", fused_front_end=False)(ids).logits
        fused = patch_model(model, backend="reference")(ids, use_cache=False).logits
        assert relative(fused, interface) < FLIPPED_ROUNDINGS

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
    def test_training_with_the_cache_that_models_make_by_default(self, family):
        model, ids = tiny_model(family).train(), tokens(2, 24)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        interface = patch_model(model, backend="reference", fused_front_end=False)(input_ids=ids, labels=ids)
        fused = patch_model(model, backend="reference")(input_ids=ids, labels=ids)
        assert geometry_report(model).rows[0]["fused_calls"] == 1
        torch.testing.assert_close(fused.loss, interface.loss, rtol=FLIPPED_ROUNDINGS, atol=0)
        for layer, other in zip(fused.past_key_values.layers, interface.past_key_values.layers, strict=True):
            assert relative(layer.keys, other.keys) < FLIPPED_ROUNDINGS
            assert relative(layer.values, other.values) < FLIPPED_ROUNDINGS

    def test_positions_of_each_sequence(self):
        model, ids = tiny_model("llama"), tokens(2, 30)
        positions = torch.stack([torch.arange(30), torch.arange(30) + 7])
        interface = patch_model(model, backend="reference", fused_front_end=False)(ids, position_ids=positions).logits
        fused = patch_model(model, backend="reference")(ids, position_ids=positions, use_cache=False).logits
        assert relative(fused, interface) < FLIPPED_ROUNDINGS

    def test_a_class_without_one_says_so(self):
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
        model = patch_model(GPTNeoXForCausalLM(GPTNeoXConfig(**shape, num_attention_heads=4)).eval())
        assert geometry_report(model).rows[0]["front_end"] == "GPTNeoXAttention has no fused forward"

    def test_another_implementation_set_later_is_honoured(self):
        model, ids = tiny_model("llama"), tokens(1, 20)
        plain = model(ids, use_cache=False).logits
        patch_model(model).set_attn_implementation("sdpa")
        assert torch.equal(model(ids, use_cache=False).logits, plain)


class TestReversible:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_unpatching_removes_it(self, family):
        model = patch_model(tiny_model(family))
        assert isinstance(attention_of(model).forward, FusedForward)
        attention = attention_of(model)
        unpatch_model(model)
        assert "forward" not in attention.__dict__

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_wrapped_one_calls_the_original_after_unpatching(self, family):
        """As accelerate's hooks do: they keep the forward they found and call it."""
        model, ids = tiny_model(family), tokens(1, 20)
        plain = model(ids, use_cache=False).logits
        attention = attention_of(patch_model(model))
        kept = attention.forward
        attention.forward = types.MethodType(lambda self, *args, **kwargs: kept(*args, **kwargs), attention)
        unpatch_model(model)
        assert torch.equal(model(ids, use_cache=False).logits, plain)

    def test_a_copy_runs_by_itself(self):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 20)
        other = copy.deepcopy(model)
        with torch.no_grad():
            attention_of(model).q_proj.weight.zero_()
        assert attention_of(other).forward.attention is attention_of(other)
        assert not torch.equal(model(ids, use_cache=False).logits, other(ids, use_cache=False).logits)
        assert geometry_report(other).rows[0]["fused_calls"] == 1


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
        # the gradient of hidden is a sum over the projections; parameters may get theirs by a copy
        others = [name for name in names if name not in products]
        assert sorted(others) == (["ones_like"] if family == "gpt2" else ["add", "add", "ones_like"])

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

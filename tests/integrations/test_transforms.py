"""Transforms of functions and exporters of graphs are refused by name, with the way out, before torch stumbles over them."""

import io

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from hf_geoscale import UnsupportedAttentionError, geometry_report, patch_model, unpatch_model

from ..conftest import tiny_model, tokens
from ..tolerances import FLIPPED_ROUNDINGS, FUSED_RUNS
from .compare import relative

CAUSAL = torch.ones(16, 16, dtype=torch.bool).tril()[None, None]

CALLS = {"mask made by the model": {}, "mask of the caller": {"attention_mask": CAUSAL}}


def loss(model, parameters, ids, **call):
    return functional_call(model, parameters, (), {"input_ids": ids, **call}).logits.pow(2).mean()


def ones_like(parameters):
    return {name: torch.ones_like(parameter) for name, parameter in parameters.items()}


def dual(model, parameters, ids, call):
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p.detach(), torch.ones_like(p)) for n, p in parameters.items()}
        return loss(model, duals, ids, **call)


GAIN = "model.layers.0.input_layernorm.weight"
FUNC = "a transform of torch.func"
TRANSFORMS = {
    "grad": (FUNC, lambda m, p, ids, call: grad(lambda q: loss(m, q, ids, **call))(p)),
    "vjp": (FUNC, lambda m, p, ids, call: vjp(lambda q: loss(m, q, ids, **call), p)),
    "jacrev": (FUNC, lambda m, p, ids, call: jacrev(lambda q: loss(m, q, ids, **call))(p)),
    "hessian": (FUNC, lambda m, p, ids, call: hessian(lambda x: loss(m, {**p, GAIN: x}, ids, **call))(p[GAIN])),
    "jvp": (FUNC, lambda m, p, ids, call: jvp(lambda q: loss(m, q, ids, **call), (p,), (ones_like(p),))),
    "linearize": (
        "(forward-mode differentiation|make_fx)",
        lambda m, p, ids, call: linearize(lambda q: loss(m, q, ids, **call), p),
    ),
    "vmap": (FUNC, lambda m, p, ids, call: vmap(lambda i: m(i[None], **call).logits)(ids)),
    "gradients of single samples": (
        FUNC,
        lambda m, p, ids, call: vmap(
            grad(lambda q, i: functional_call(m, q, (i[None],), call).logits.sum()), (None, 0)
        )(p, ids),
    ),
    "forward mode": ("forward-mode differentiation", dual),
    "make_fx": ("make_fx", lambda m, p, ids, call: make_fx(lambda i: m(i, **call).logits)(ids)),
    "export": ("torch.export", lambda m, p, ids, call: torch.export.export(m, (ids,), call, strict=False)),
    "trace": (
        "torch.jit.trace",
        lambda m, p, ids, call: torch.jit.trace(lambda i: m(i, **call).logits, (ids,)),
    ),
}


@pytest.fixture(params=[True, False], ids=["fused", "interface"])
def model(request):
    model = patch_model(tiny_model("llama"), fused_front_end=request.param)
    model.config.use_cache = False
    return model


OWN_MASK_ALONE = ("make_fx", "linearize")
"""Tracers that transformers' own mask code cannot run under, patched or not."""

CASES = [
    (name, call)
    for name in TRANSFORMS
    for call in CALLS
    if call != "mask made by the model" or name not in OWN_MASK_ALONE
]


@pytest.mark.parametrize(("name", "call"), CASES)
def test_is_refused_with_the_way_out(model, name, call):
    what, run = TRANSFORMS[name]
    if name in ("trace", "export"):
        model.requires_grad_(False)
    with pytest.raises(UnsupportedAttentionError, match=rf"no rule for {what}.*unpatch_model\(model\) first"):
        run(model, dict(model.named_parameters()), tokens(2, 16), CALLS[call])
    before = geometry_report(model).rows[1]["calls"]
    model(tokens(1, 16))  # nothing has stayed
    assert geometry_report(model).rows[1]["calls"] == before + 1


def test_the_way_out_is_one():
    model = tiny_model("llama").requires_grad_(False)
    model.config.use_cache = False
    parameters = dict(model.named_parameters())
    model.set_attn_implementation("eager")  # SDPA has no second derivative on a CPU either
    expected = grad(lambda q: loss(model, q, tokens(2, 16)))(parameters)
    unpatch_model(patch_model(model))
    found = grad(lambda q: loss(model, q, tokens(2, 16)))(parameters)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("call", CALLS)
def test_one_graph_and_strict_export_name_it(model, call):
    if "reason" not in torch.compiler.disable.__code__.co_varnames:
        pytest.skip("torch before 2.7 gives no reason")
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"hf_geoscale.unpatch_model\(model\) for a single graph"):
        torch.compile(model, fullgraph=True, backend="eager")(tokens(1, 16), **CALLS[call])
    with pytest.raises(Exception, match=r"hf_geoscale.unpatch_model\(model\) for a single graph"):
        torch.export.export(model, (tokens(1, 16),), CALLS[call], strict=True)
    torch._dynamo.reset()


def test_onnx_names_it(model):
    with pytest.raises(Exception, match=r"unpatch_model\(model\) first"):
        torch.onnx.export(model.requires_grad_(False), (tokens(1, 16),), io.BytesIO(), dynamo=False)


def test_functional_call_is_none(model):
    """Weights given for one call are measured like any others, and gradients reach them."""
    other = tiny_model("llama", seed=1)
    parameters = dict(other.named_parameters())
    found = loss(model, parameters, tokens(2, 16))
    patched = patch_model(other, fused_front_end=model.model.layers[0].self_attn.geoscale.config.fused_front_end)
    expected = patched(input_ids=tokens(2, 16)).logits.pow(2).mean()
    # On a GPU the call's weights are measured and multiplied in another arrangement.
    assert relative(found, expected) <= (FLIPPED_ROUNDINGS if found.is_cuda else 0)
    allowed = FUSED_RUNS if found.is_cuda else 0
    gradients = torch.autograd.grad(found, list(parameters.values()))
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, list(other.parameters())), strict=True):
        assert relative(mine, theirs) <= allowed

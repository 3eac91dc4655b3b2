"""Arguments that `fp8_attention` refuses, and what it says."""

import pytest
import torch

from hf_geoscale import fp8_attention

from .samples import draw, scales


def bad_calls():
    q, k, v = (x.detach() for x in draw())
    s = scales(q, k, v)
    yield "3-D", (q[0], k, v), s, {}, ValueError, r"query must be \(batch, heads, length, head_dim\)"
    yield "integer", (q.int(), k, v), s, {}, TypeError, "query must be float32.*int32"
    yield "k and v differ", (q, k, v[:, :, :-1]), s, {}, ValueError, "key and value must share one shape"
    yield "groups", (q[:, :3], k, v), s, {}, ValueError, "multiple of key/value heads, got 3 and 2"
    yield "head dim 72", (q[..., :8], k[..., :8], v[..., :8]), s, {}, ValueError, "multiple of 16 up to 256, got 8"
    yield "scale shape", (q, k, v), {**s, "q_quant_scale": torch.ones(3)}, {}, ValueError, r"q_quant_scale.*\(4,\)"
    yield (
        "scale dtype",
        (q, k, v),
        {**s, "v_quant_scale": torch.ones(2).double()},
        {},
        ValueError,
        "v_quant_scale.*float64",
    )
    yield "window", (q, k, v), s, {"window": 0}, ValueError, "window must be at least 1"
    yield "window without causal", (q, k, v), s, {"window": 5, "causal": False}, ValueError, "needs causal=True"
    yield "key range", (q, k, v), s, {"key_range": torch.zeros(2, 3, 2)}, ValueError, r"\(2, 70, 2\)"
    yield "dropout", (q, k, v), s, {"dropout_p": 1.0}, ValueError, r"\[0, 1\), got 1.0"
    yield "precision", (q, k, v), s, {"precision": "low"}, ValueError, "'low'"
    yield "softmax scale", (q, k, v), s, {"softmax_scale": 0.0}, ValueError, "softmax_scale must be positive, got 0.0"
    yield (
        "key range of floats",
        (q, k, v),
        s,
        {"key_range": torch.zeros(2, 70, 2)},
        TypeError,
        "integers, got torch.float32",
    )
    yield "empty", (q[:, :, :0], k, v), s, {}, ValueError, "0 query rows"
    yield "no sequence", (q[:0], k[:0], v[:0]), s, {}, ValueError, "0 sequences"
    yield "no heads", (q, k[:, :0], v[:, :0]), s, {}, ValueError, "multiple of key/value heads, got 4 and 0"
    yield "devices", (q, k.to("meta"), v), s, {}, ValueError, "key is on meta, query on cpu"


@pytest.mark.parametrize("call", list(bad_calls()), ids=lambda call: call[0])
def test_bad_input_is_named(call):
    _, operands, s, options, error, message = call
    with pytest.raises(error, match=message):
        fp8_attention(*operands, **s, **options)


def test_tensors_that_the_operands_are_no_views_of_are_named():
    rows = tuple(torch.randn(2, 70, heads * 32) for heads in (4, 2, 2))
    views = [x.view(2, 70, -1, 32).transpose(1, 2) for x in rows]
    s = scales(*views)
    fp8_attention(*views, packed=rows, backend="reference", **s)
    with pytest.raises(ValueError, match=r"value must be a view of its tensor in packed.*\(2, 2, 70, 32\)"):
        fp8_attention(*views, packed=(rows[0], rows[1], rows[1]), **s)
    with pytest.raises(
        ValueError, match=r"query must be a view.* with strides \(8960, 2240, 32, 1\) and packed \(2, 70"
    ):
        fp8_attention(rows[0].view(2, 4, 70, 32), *views[1:], packed=rows, **s)
    with pytest.raises(ValueError, match=r"key must be a view"):
        fp8_attention(*views, packed=(rows[0], rows[1][:, :35], rows[2]), **s)
    for wrong, said in (([*rows], "a list of 3"), ((rows[0], rows[1]), "a tuple of 2"), (3, "a int")):
        with pytest.raises(TypeError, match=f"packed must be a tensor or a tuple of three, got {said}"):
            fp8_attention(*views, packed=wrong, **s)


def test_one_sequence_cut_from_a_longer_one_is_a_view_of_its_rows():
    """Strides of a dimension of one entry mean nothing, and `view` recomputes them."""
    rows = tuple(torch.randn(1, 90, n, dtype=torch.bfloat16)[:, :70] for n in (128, 64, 64))
    views = [x.view(1, 70, -1, 32).transpose(1, 2) for x in rows]
    assert views[0].stride(0) != rows[0].stride(0)
    out = fp8_attention(*views, packed=rows, backend="reference", **scales(*views))
    assert torch.equal(out, fp8_attention(*views, backend="reference", **scales(*views)))

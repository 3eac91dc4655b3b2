import pytest
import torch

from hf_geoscale.geometry import Projection, measure_layer
from hf_geoscale.scaling import E4M3, GeometryScaling


def geometry(factor: float = 1.0):
    weight = factor * torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
    p, kv = Projection(weight), Projection(weight[:2])
    return measure_layer(p, kv, kv, 0.25)


def operands():
    return torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16)


def test_scale_maps_the_certificate_to_the_largest_number():
    for headroom in (1.0, 4.0):
        scaling, layer = GeometryScaling(headroom), geometry()
        scaling.refresh(layer)
        scales = scaling.quant_scales(*operands())
        torch.testing.assert_close(
            scales.q.double() * layer.q_bound * headroom, torch.full((4,), E4M3.max, dtype=torch.float64)
        )
        assert scales.k.shape == scales.v.shape == (2,)
        assert scales.q.dtype == torch.float32


def test_data_never_reaches_a_scale():
    scaling = GeometryScaling()
    scaling.refresh(geometry())
    before = scaling.quant_scales(*operands())
    scaling.observe(*(torch.full((n,), 1e30) for n in (4, 2, 2)))
    after = scaling.quant_scales(*(x + 1e30 for x in operands()))
    assert torch.equal(before.q, after.q)
    assert torch.equal(before.v, after.v)


def test_zero_weights_give_finite_scales():
    scaling = GeometryScaling()
    scaling.refresh(geometry(0.0))
    assert torch.isfinite(scaling.quant_scales(*operands()).q).all()


def test_unrefreshed_scaling_says_what_to_do():
    with pytest.raises(RuntimeError, match="refresh"):
        GeometryScaling().quant_scales(*operands())

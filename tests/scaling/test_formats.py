import math

import pytest
import torch

from hf_geoscale.scaling import E4M3, E5M2, count_overflow, saturating_cast, sqnr_db

FORMATS = (E4M3, E5M2)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_limits_are_those_of_the_dtype(fmt):
    info = torch.finfo(fmt.dtype)
    assert fmt.max == info.max
    assert fmt.epsilon == info.eps


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_cast_saturates_and_keeps_nan(fmt):
    x = torch.tensor([0.0, 1.0, fmt.max, fmt.max * 1.5, math.inf, -math.inf, math.nan])
    cast = saturating_cast(x, fmt).float()
    assert cast[:6].tolist() == [0.0, 1.0, fmt.max, fmt.max, fmt.max, -fmt.max]
    assert cast[6].isnan()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_overflow_is_counted_before_the_cast(fmt):
    above = math.nextafter(fmt.max, math.inf) * (1 + 1e-6)
    x = torch.tensor([0.0, fmt.max, -fmt.max, above, -above, math.inf, math.nan])
    assert int(count_overflow(x, fmt)) == 4
    assert int(count_overflow(saturating_cast(x[:6], fmt).float(), fmt)) == 0


def test_rounding_is_to_nearest_even():
    assert saturating_cast(torch.tensor([17.0, 19.0, 2.0**-10, 3 * 2.0**-10])).float().tolist() == [
        16.0,
        20.0,
        0.0,
        2.0**-8,
    ]


def test_sqnr():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert float(sqnr_db(x, 1.1 * x)) == pytest.approx(20.0, abs=1e-4)
    assert float(sqnr_db(x, x)) == math.inf

"""Dropout of the reference attention: the mask of its generator, in forward and backward."""

import math

import pytest
import torch

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import Visibility
from hf_geoscale.kernels.philox import dropout_keep, philox

from .samples import assert_near_exact, draw, exact, scales


class TestDropout:
    def test_mask_share_and_independence_of_tiles(self):
        rows, columns = torch.arange(128), torch.arange(256)
        keep = dropout_keep(1234, 0.3, 4, rows, columns)
        assert float(keep.double().mean()) == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / keep.numel()))
        tile = dropout_keep(1234, 0.3, 4, rows[64:], columns[100:])
        assert torch.equal(tile, keep[:, 64:, 100:])
        assert not torch.equal(keep[0], keep[1])
        assert not torch.equal(keep, dropout_keep(1235, 0.3, 4, rows, columns))

    def test_output_and_gradients_use_the_same_mask(self):
        q, k, v = draw(rows=130)
        p, seed = 0.2, 2**40 + 7
        out = fp8_attention(q, k, v, **scales(q, k, v), dropout_p=p, dropout_seed=seed)
        keep = dropout_keep(seed, p, 8, torch.arange(130), torch.arange(130)).view(2, 4, 130, 130)
        truth = exact(q, k, v, Visibility(130, 130).dense(q.device), 0.125, keep, p)
        assert_near_exact(out, truth, [q, k, v], seed=2)

    def test_seed_comes_from_torch(self):
        q, k, v = draw()
        outs = []
        for _ in range(2):
            torch.manual_seed(5)
            outs.append(fp8_attention(q, k, v, **scales(q, k, v), dropout_p=0.5))
        assert torch.equal(*outs)
        assert not torch.equal(outs[0], fp8_attention(q, k, v, **scales(q, k, v), dropout_p=0.5))

    def test_the_default_device_is_not_asked_for_a_seed(self):
        """Checkpointing restores the generators of the CPU and of the operands' device, and of no other."""
        q, k, v = (x.cpu() for x in draw(rows=16))
        options = scales(q, k, v) | {"dropout_p": 0.5}
        torch.manual_seed(1)
        expected = fp8_attention(q, k, v, **options)
        torch.manual_seed(1)
        with torch.device("meta"):
            assert torch.equal(fp8_attention(q, k, v, **options), expected)


def test_philox_known_answers():
    """Vectors of the Random123 distribution (kat_vectors, philox4x32 10)."""

    def words(counter, seed):
        return [int(w) for w in philox(tuple(torch.tensor(c) for c in counter), seed)]

    assert words((0, 0, 0, 0), 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert words((ones,) * 4, (ones << 32) | ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(pi, (0x299F31D0 << 32) | 0xA4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]

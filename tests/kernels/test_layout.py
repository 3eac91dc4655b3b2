"""Hadamard mix and visibility."""

import pytest
import torch

from hf_geoscale.kernels import Visibility, hadamard, key_range_of_block
from hf_geoscale.kernels.hadamard import hadamard_block, hadamard_signs
from hf_geoscale.kernels.visibility import ROW_BLOCK


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
def test_hadamard_is_an_orthonormal_involution(dim):
    x = torch.randn(5, 3, dim, generator=torch.Generator().manual_seed(0))
    mixed = hadamard(x)
    torch.testing.assert_close(hadamard(mixed), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed @ mixed.mT, x @ x.mT, rtol=1e-5, atol=1e-4)
    spike = hadamard(torch.eye(dim)[0])
    assert int((spike != 0).sum()) == hadamard_block(dim)
    assert spike.abs().max() == hadamard_block(dim) ** -0.5


@pytest.mark.parametrize("block", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_signs_are_the_same_matrix_in_every_block(width, block):
    """The Hopper kernels load the first 64 × 64 of them alone."""
    block = min(block, width)
    signs = hadamard_signs(width, block, torch.device("cpu")).float()
    one = hadamard(torch.eye(block)) * block**0.5
    torch.testing.assert_close(signs, torch.block_diag(*[one] * (width // block)))


@pytest.mark.parametrize("dim", [40, 48, 64, 72, 80, 96, 112, 128])
def test_a_mix_by_halves_is_the_whole_mix(dim):
    """As `hopper.shared.mix` does it: each half times the same 64 × 64 signs, and one more butterfly for blocks of 128."""
    padded, block = 64 if dim <= 64 else 128, hadamard_block(dim)
    signs = hadamard_signs(padded, block, torch.device("cpu"))[:64, :64].float()
    x = torch.randn(5, padded, generator=torch.Generator().manual_seed(0))
    x[:, dim:] = 0
    parts = [half @ signs for half in x.split(64, dim=1)]
    if block > 64:
        left, right = parts
        parts = [left + right, left - right]
    torch.testing.assert_close(torch.cat(parts, 1)[:, :dim] * block**-0.5, hadamard(x[:, :dim]))


def test_hadamard_rows_do_not_depend_on_their_batch():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(hadamard(x)[17], hadamard(x[17:18])[0])


@pytest.mark.parametrize("query_length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("key_length", [1, 64, 97, 200])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5), (True, 100)])
def test_blocks_cover_the_mask(query_length, key_length, causal, window):
    visibility = Visibility(query_length, key_length, causal, window)
    i = torch.arange(query_length)[:, None] + key_length - query_length
    j = torch.arange(key_length)
    expected = torch.ones(query_length, key_length, dtype=torch.bool)
    expected = expected & (j <= i) if causal else expected
    expected = expected & (j > i - window) if window else expected
    assert torch.equal(visibility.dense(torch.device("cpu"))[0, 0], expected)
    rebuilt = torch.zeros_like(expected)
    for rows, columns, visible in visibility.blocks(torch.device("cpu")):
        assert rows.stop - rows.start <= ROW_BLOCK
        assert columns.start % 4 == 0
        assert columns.stop > columns.start
        rebuilt[rows, columns] = visible[0]
    assert torch.equal(rebuilt, expected)


def test_window_blocks_skip_what_nobody_sees():
    spans = [c.stop - c.start for _, c, _ in Visibility(1024, 1024, True, 32).blocks(torch.device("cpu"))]
    assert max(spans) <= 32 + ROW_BLOCK + 4


def test_key_range_of_block():
    visible = torch.tensor([[[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]]).bool()
    ranges, contiguous = key_range_of_block(visible)
    assert ranges.tolist() == [[[1, 3], [0, 0], [0, 4]]]
    assert contiguous
    assert not key_range_of_block(torch.tensor([[[1, 0, 1, 0]]]).bool())[1]

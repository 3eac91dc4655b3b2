"""RoPE inside the op: the same attention, and the same gradients, as of queries and keys that were rotated before."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_geoscale import fp8_attention
from hf_geoscale.kernels.rotary import rotate

from ..tolerances import FUSED_ERROR
from .fused_cases import DEVICE, NEEDS_KERNELS, agree, operands, run
from .samples import draw, relative, scales


def angles(length: int, turned: int, batch: int = 1, dtype: torch.dtype = torch.float32, factor: float = 1.0):
    """cos and sin, (batch, L, R/2): positions of sequence b start at 1000·b, frequencies as in Llama."""
    positions = torch.arange(length)[None] + 1000 * torch.arange(batch)[:, None]
    frequencies = 10_000.0 ** -(torch.arange(turned // 2) / (turned // 2))
    phase = positions[..., None] * frequencies
    return (phase.cos() * factor).to(DEVICE, dtype), (phase.sin() * factor).to(DEVICE, dtype)


CASES = {
    "llama": {},
    "a position per sequence": {"batch": 2, "angles": {"batch": 2}},
    "one position for all": {"batch": 2},
    "bfloat16 angles": {"angles": {"dtype": torch.bfloat16}},
    "yarn factor": {"angles": {"factor": 1.3}},
    "partial": {"angles": {"turned": 32}},
    "partial, no multiple of 16": {"angles": {"turned": 24}},
    "interleaved": {"rotary_interleaved": True},
    "interleaved, partial": {"rotary_interleaved": True, "angles": {"turned": 16}},
    "dim 80": {"dim": 80, "angles": {"turned": 80}},
    "dim 96, interleaved": {"dim": 96, "rotary_interleaved": True, "angles": {"turned": 96}},
    "dim 128, prime length": {"dim": 128, "rows": 131, "angles": {"turned": 128}},
    "dim 256": {"dim": 256, "angles": {"turned": 256}},
    "window": {"rows": 150, "window": 50},
    "padding": {"ranges": "padding", "rows": 131},
    "two groups": {"heads": 4, "kv_heads": 2},
    "no hadamard": {"incoherent": False},
    "high precision": {"precision": "high"},
    "dropout": {"dropout_p": 0.2, "dropout_seed": 7},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
}


@pytest.fixture(params=CASES)
def case(request) -> tuple[list[Tensor], dict]:
    """Leaves before RoPE, and options with their angles."""
    given = dict(CASES[request.param])
    chosen = given.pop("angles", {})
    leaves, options = operands(given)
    length, dim = leaves[0].shape[2:]
    return leaves, {**options, "rotary": angles(length, **{"turned": dim, **chosen})}


def rotated(leaves: list[Tensor], options: dict) -> list[Tensor]:
    """Queries and keys after RoPE, and values."""
    interleaved = options.get("rotary_interleaved", False)
    return [*(rotate(x, *options["rotary"], interleaved) for x in leaves[:2]), leaves[2]]


def with_scales_after(leaves: list[Tensor], options: dict) -> dict:
    """Options with the scales of the rotated operands: a factor on cos and sin lengthens them."""
    return {**options, **scales(*rotated(leaves, options))}


class TestRotate:
    def test_is_what_llama_does(self):
        q, k, _ = draw(rows=40, dim=64)
        cos, sin = (x.cpu() for x in angles(40, 64))
        theirs = apply_rotary_pos_emb(q, k, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
        for x, y in zip((q, k), theirs, strict=True):
            torch.testing.assert_close(rotate(x, cos, sin), y.to(x.dtype), rtol=2**-7, atol=2**-7)

    def test_interleaved_pairs_are_neighbours(self):
        x = torch.randn(1, 1, 3, 8, dtype=torch.float64).float()
        cos, sin = (t.cpu() for t in angles(3, 8))
        turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.complex(cos, sin)[:, None]
        torch.testing.assert_close(rotate(x, cos, sin, True), torch.view_as_real(turned).flatten(-2))

    def test_channels_beyond_are_left_alone(self):
        x = torch.randn(1, 2, 5, 32)
        assert torch.equal(rotate(x, *(t.cpu() for t in angles(5, 16)))[..., 16:], x[..., 16:])


def test_reference_is_that_of_rotated_operands(case):
    leaves, options = case
    options = with_scales_after(leaves, options)
    before = rotated([x.detach() for x in leaves], options)
    options_before = {k: v for k, v in options.items() if not k.startswith("rotary")}
    out = fp8_attention(*leaves, **options, backend="reference")
    assert torch.equal(out, fp8_attention(*before, **options_before, backend="reference"))


@pytest.mark.usefixtures("hardware_rounding")
class TestFused:
    pytestmark = NEEDS_KERNELS

    def test_agrees_with_the_reference(self, case):
        leaves, options = case
        if leaves[0].dtype == torch.float32:
            pytest.skip("the reference keeps float32 after RoPE, where the kernels round to bfloat16")
        options = with_scales_after(leaves, options)
        assert agree(run(leaves, options), run(leaves, options, backend="reference"))

    @pytest.mark.parametrize(
        "case", ["llama", "a position per sequence", "interleaved, partial", "dim 80", "float32"], indirect=True
    )
    def test_operands_are_those_of_rotated_inputs(self, case):
        """The kernels round where `rotate` does, so the forward differs by float32 round-off that flips a few roundings."""
        leaves, options = case
        options = with_scales_after(leaves, options)
        before = [x.detach() for x in rotated(leaves, options)]
        options_before = {k: v for k, v in options.items() if not k.startswith("rotary")}
        mine = fp8_attention(*(x.detach() for x in leaves), **options, backend="triton")
        assert relative(mine, fp8_attention(*before, **options_before, backend="triton")) < FUSED_ERROR / 4

    def test_two_runs_are_the_same_bits(self):
        leaves, options = operands({"dim": 128, "rows": 131})
        options["rotary"] = angles(131, 128)
        assert all(torch.equal(a, b) for a, b in zip(run(leaves, options), run(leaves, options), strict=True))


class TestArguments:
    @pytest.mark.parametrize(
        ("shape", "said"),
        [((1, 39, 32), "39"), ((3, 40, 32), r"\(1 or 1, 40, R/2\)"), ((1, 40, 33), "R = 2 x 33"), ((40, 32), "R/2")],
    )
    def test_shapes_are_checked(self, shape, said):
        leaves, options = operands({"rows": 40})
        with pytest.raises(ValueError, match=said):
            fp8_attention(*leaves, **options, rotary=2 * (torch.ones(shape, device=DEVICE),), backend="reference")

    def test_cos_and_sin_are_a_pair(self):
        leaves, options = operands({"rows": 40})
        with pytest.raises(ValueError, match=r"\(1, 40, 16\)"):
            fp8_attention(*leaves, **options, rotary=(angles(40, 64)[0], angles(40, 32)[1]))

    def test_as_many_keys_as_queries(self):
        leaves, options = operands({"rows": 40, "keys": 50})
        with pytest.raises(ValueError, match="50 and 40"):
            fp8_attention(*leaves, **options, rotary=angles(40, 64))

    def test_floating_point(self):
        leaves, options = operands({"rows": 40})
        whole = torch.ones(1, 40, 32, dtype=torch.int64, device=DEVICE)
        with pytest.raises(TypeError, match=r"torch\.int64"):
            fp8_attention(*leaves, **options, rotary=(whole, whole))

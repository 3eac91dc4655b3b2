"""Float64 truth about the projections of a patched model, read off their own forward."""

import copy

import torch
from torch import Tensor

from hf_geoscale import geometry_report
from hf_geoscale.integrations import geoscale_layers

from ..tolerances import FLOAT64_ROUNDOFF


def true_map(module, width: int) -> tuple[Tensor, Tensor]:
    """(W (out, in), c (out,)) of an affine module from its own forward in float64, on the identity and on zero."""
    twin = copy.deepcopy(module).double()
    with torch.no_grad():
        offset = twin(torch.zeros(1, width, dtype=torch.float64))[0]
        return (twin(torch.eye(width, dtype=torch.float64)) - offset).T, offset


def true_projections(site) -> list[tuple[Tensor, Tensor]]:
    """(A, c) of q, k and v by head, of u after the norm without gain and shift: (H, D, d) and (H, D)."""
    width = site.attention.config.hidden_size
    twin = copy.deepcopy(site.input_norm).double()
    with torch.no_grad():  # two unit vectors of opposite sign tell gain from shift
        probe = torch.cat([torch.eye(width, dtype=torch.float64)] * 2)
        probe[:width] -= torch.eye(width, dtype=torch.float64).roll(1, 1)
        probe[width:] = -probe[:width]
        plus, minus = twin(1e6 * probe).split(width)
        shift = ((plus + minus) / 2).mean(0)
        gain = (plus - shift).diagonal() / (width / 2) ** 0.5
    found = []
    fused = hasattr(site.attention, "c_attn")
    names = ["c_attn"] if fused else ["q_proj", "k_proj", "v_proj"]
    for name in names:
        weight, offset = true_map(getattr(site.attention, name), width)
        for part, c in zip(weight.chunk(3 if fused else 1), offset.chunk(3 if fused else 1), strict=True):
            dim = site.attention.head_dim
            found.append(((part * gain).view(-1, dim, width), (c + part @ shift).view(-1, dim)))
    return found


def assert_certified(model) -> None:
    """Every map is the module's own, and every certificate holds for the worst token of every head."""
    for layer in geoscale_layers(model):
        site = layer.site
        layer.refresh_if_stale()
        for name, (matrix, offset), projection in zip("qkv", true_projections(site), site.projections(), strict=True):
            factor = projection.rotary_factor
            torch.testing.assert_close(projection.matrix(), matrix * factor, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(projection.offset(), offset * factor, rtol=1e-5, atol=1e-6)
            root = matrix.shape[-1] ** 0.5
            _, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
            tokens = torch.cat([right[:, 0], -right[:, 0]]) * root  # (2H, d)
            reached = (torch.einsum("hcd,td->htc", matrix, tokens) + offset[:, None]).norm(dim=-1).amax(1) * factor
            bound = getattr(layer.geometry, f"{name}_bound")
            assert (reached <= bound * (1 + FLOAT64_ROUNDOFF)).all()
            assert (root * sigma[:, 0] * factor <= bound).all()


@torch.no_grad()
def adversarial_embeddings(model) -> Tensor:
    """Tokens that the first layer's norm turns towards the worst directions of every head of q, k and v: (1, L, d) float32."""
    site = geoscale_layers(model)[0].site
    directions = torch.cat(
        [torch.linalg.svd(matrix, full_matrices=False)[2][:, 0] for matrix, _ in true_projections(site)]
    )
    return 1e3 * torch.cat([directions, -directions])[None].float()


def overflows(model) -> int:
    return sum(row["overflows"] for row in geometry_report(model).rows)


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())

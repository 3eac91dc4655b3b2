"""What one family has and others have not: cancelling shifts and dropout of GPT-2, the window of Mistral."""

import pytest
import torch

from hf_geoscale import geometry_report, patch_model
from hf_geoscale.geometry import gram, sigma_upper
from hf_geoscale.geometry.certificates import ROUNDING_MARGIN
from hf_geoscale.integrations import geoscale_layers

from ..conftest import VOCABULARY, tiny_model, tokens


@pytest.mark.parametrize("how", ["float32", "autocast", "bfloat16"])
def test_certificates_survive_shifts_that_cancel(how):
    """Opposite rows of W and a large shift: c = 0 and A is small, yet in BF16 the rounding of the shift reaches q."""
    model = tiny_model("gpt2")
    block = model.transformer.h[0]
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        # chosen so that gain·u + shift lies just beyond a tie of BF16
        block.ln_1.weight.fill_(0.0112 if how == "bfloat16" else 1e-3)
        block.ln_1.bias.zero_()
        block.ln_1.bias[:2] = 16.0 if how == "bfloat16" else 16.0625
        block.attn.c_attn.weight.zero_()
        block.attn.c_attn.weight[0], block.attn.c_attn.weight[1] = 1.0, -1.0
        block.attn.c_attn.bias.zero_()
    if how == "bfloat16":
        model.to(torch.bfloat16)
    patch_model(model)
    embeddings = torch.zeros(1, 8, 64, dtype=model.dtype)
    embeddings[..., 0], embeddings[..., 1] = 100, -100
    embeddings[:, 1::2] *= -1
    with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=how == "autocast"):
        model(inputs_embeds=embeddings)
    row = geometry_report(model).rows[0]
    assert row["overflows"] == 0
    assert 0 < row["utilisation"] <= 1
    query = geoscale_layers(model)[0].site.projections()[0]
    exact = 64**0.5 * sigma_upper(gram(query.matrix())) + query.offset().norm(dim=-1)
    beyond = max(row["q_amax"]) > float(exact.amax()) * (1 + ROUNDING_MARGIN)
    assert beyond == (how != "float32")  # only the terms for a shift that cancels keep the certificate


def test_gpt2_trains_with_its_default_dropout():
    model, ids = tiny_model("gpt2").train(), tokens(2, 40)
    assert model.config.attn_pdrop == 0.1
    patch_model(model)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(model(ids, labels=ids).loss.detach()))
    assert losses[0] == losses[1] != losses[2]


def test_mistral_window_is_honoured():
    model, ids = tiny_model("mistral-window"), tokens(1, 60)
    patch_model(model)
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % (VOCABULARY - 3) + 3
    with torch.no_grad():
        a, b = model(ids).logits, model(other).logits
    # two layers of a window of 9 reach back 16 tokens
    assert torch.equal(a[:, 17:], b[:, 17:])
    assert not torch.equal(a[:, 16], b[:, 16])

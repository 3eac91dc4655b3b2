"""Every family of tests/conftest.py: forward, padding, backward, and generation with a cache."""

import pytest
import torch
from torch import Tensor, nn

from hf_geoscale import patch_model
from hf_geoscale.kernels.backend import triton_missing

from ..conftest import FAMILIES, here, tiny_model, tokens
from ..kernels.conftest import hardware_rounding  # noqa: F401
from .control import Outcome, compare

LENGTH, NEW = 40, 4


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the projections, one row a module name."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and ("_proj" in name or "c_attn" in name) and "mlp" not in name:
            found.setdefault(name.split(".")[-2], []).append(parameter.grad.flatten())
    return {f"gradient of {name}": torch.cat(grads) for name, grads in found.items()}


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def generated(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of each new token, the tokens being given, so that no rounding can choose another continuation."""
    given = tokens(1, LENGTH + NEW, seed=3)[0].tolist()
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda batch, seen: [given[len(seen)]],
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.sequences[:, LENGTH:].tolist() == [given[LENGTH:]] * len(ids)
    return torch.stack(out.logits)


def everything(family: str, **options):
    def scenario(patched: bool) -> Outcome:
        model, ids = without_dropout(tiny_model(family)), tokens(2, LENGTH)
        if patched:
            patch_model(model, **options)
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        with torch.no_grad():
            outputs = {
                "logits": model(ids).logits,
                "logits without a cache": model(ids, use_cache=False).logits,
                "logits under left padding": model(ids, attention_mask=mask).logits[mask.bool()],
                "logits of new tokens": generated(model, ids, torch.ones_like(ids)),
                "logits of new tokens after left padding": generated(model, ids, mask),
            }
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return Outcome(outputs, gradients(model), model)

    return scenario


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    compare(everything(family))


def test_portable_kernels(hardware_rounding):  # noqa: F811
    """Of the Triton that was resolved, in its interpreter where there is no GPU."""
    if reason := triton_missing(here()):
        pytest.skip(reason)

    def scenario(patched: bool) -> Outcome:
        model, ids = tiny_model("llama").train(), tokens(1, LENGTH)
        if patched:
            patch_model(model, backend="triton")
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        return Outcome({"logits": out.logits}, gradients(model), model)

    compare(scenario)

"""What low precision really does to a model's logits: as a whole, and one layer's attention at a time."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_geoscale import fragility_report, patch_model
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.attention import geoscale_attention_forward
from hf_geoscale.integrations.fragility_contexts import ieee_float32

PRECISIONS = ("bfloat16", "float16", "float8_e4m3")
ONE_LAYER = "fragility_one_layer"
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_target: dict[str, int | str] = {"layer": -1, "precision": "float32"}


def _one_layer(module, query, key, value, mask, **options):
    """Float32 SDPA, except in the target layer: its q, k and v in BF16, and its attention in BF16 or FP8."""
    if module.layer_idx != _target["layer"]:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    operands = (x.bfloat16() for x in (query, key, value))
    attend = geoscale_attention_forward if _target["precision"] == "float8_e4m3" else sdpa_attention_forward
    with sdpa_kernel(FUSED):  # plain products in BF16 would be summed and stored in float32
        return attend(module, *operands, mask, **options)[0].float(), None


AttentionInterface.register(ONE_LAYER, _one_layer)
AttentionMaskInterface.register(ONE_LAYER, sdpa_mask)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, L, vocabulary) float32, of a model in evaluation mode."""
    return model(input_ids=ids, use_cache=False).logits.float()


def distance(low: Tensor, exact: Tensor) -> float:
    """‖y_low − y_FP32‖/‖y_FP32‖; not a number where the low precision overflowed."""
    return float((low - exact).norm() / exact.norm())


@contextmanager
def exact_attention() -> Iterator[None]:
    """SDPA as plain matrix products, and these in IEEE float32."""
    with ieee_float32(), sdpa_kernel(SDPBackend.MATH):
        yield


def whole_model(model: PreTrainedModel, ids: Tensor, precisions: tuple[str, ...] = PRECISIONS) -> dict[str, float]:
    """Mismatch of the whole model by precision; FP8 is BF16 with our FP8 attention. `model` is in float32 and unpatched."""
    with exact_attention():
        exact = logits(model, ids)
    found = {}
    for precision in precisions:
        low = copy.deepcopy(model).to(torch.float16 if precision == "float16" else torch.bfloat16)
        if precision == "float8_e4m3":
            patch_model(low)
        found[precision] = distance(logits(low, ids), exact)
    return found


def one_layer_at_a_time(model: PreTrainedModel, ids: Tensor, precision: str) -> list[float]:
    """Mismatch of the logits with only layer l's attention in a low precision and everything else in float32."""
    patched = patch_model(copy.deepcopy(model))
    found = []
    for module in (m for m in patched.modules() if getattr(m, "config", None) is not None):
        module.config._attn_implementation = ONE_LAYER
    with exact_attention():
        _target.update(layer=-1, precision=precision)
        exact = logits(patched, ids)
        for layer in range(len(geoscale_layers(patched))):
            _target.update(layer=layer)
            found.append(distance(logits(patched, ids), exact))
    _target.update(layer=-1)
    return found


def scores(model: PreTrainedModel, ids: Tensor) -> dict[str, dict[str, list[float]]]:
    """What could rank the layers, by precision of the attention: the predictor, parts of it, baselines. Larger: more error."""
    patched = patch_model(copy.deepcopy(model))
    report = fragility_report(patched, ids, "float8_e4m3", rest="float32")
    rows = report.rows
    bounds = [float(layer.geometry.v_bound.amax()) for layer in geoscale_layers(patched)]
    v1 = [r["kappa_softmax_v1"] * (1 + r["kappa_score"]) * r["kappa_value"] * r["output_sigma"] for r in rows]
    common = {
        "attention magnitude": [r["attention_magnitude"] for r in rows],
        "κ_softmax": [r["kappa_softmax"] for r in rows],
        "v1, attention term": v1,
        "norms: certificate of the logits": [r["logit_bound"] for r in rows],
        "norms: certificates of logits and v, ‖W_O‖": [
            r["logit_bound"] * v * r["output_sigma"] for r, v in zip(rows, bounds, strict=True)
        ],
        "entropy": [-r["entropy"] for r in rows],
        "gain of the attention branch": [r["attention_gain"] for r in rows],
        "depth": [-float(r["layer"]) for r in rows],
    }
    return {
        p: {"risk": [r["risk"] for r in report.at(p, "float32").rows]} | common for p in ("float8_e4m3", "bfloat16")
    }


def layer_record(model: PreTrainedModel, ids: Tensor, setting: dict) -> list[dict]:
    """One record a precision: every score and the measured mismatch, layer by layer."""
    found = scores(model, ids)
    return [
        {"kind": "layers", **setting, "length": ids.shape[1], "precision": precision}
        | {"measured": one_layer_at_a_time(model, ids, precision), "scores": found[precision]}
        for precision in found
    ]


def length_record(model: PreTrainedModel, ids: Tensor, setting: dict) -> dict:
    """Prediction and measurement of the whole model at one length."""
    report = fragility_report(model, ids, v1=False)
    predicted = {p: report.at(p).predicted for p in PRECISIONS}
    record = {"kind": "lengths", **setting, "length": ids.shape[1], "predicted": predicted}
    return record | {"measured": whole_model(model, ids)}

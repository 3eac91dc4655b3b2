"""`fragility_report`: how much each layer of a model amplifies rounding errors, from one forward without gradient."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import UnsupportedModelError
from ..geometry import power_iteration, start_vectors
from ..geometry.spectral import COLD_ROUNDS
from ..stability import AttentionCall, FragilityReport
from ..stability.fragility import Norms
from ..stability.fragility_risk import ROUNDOFFS, Precision, add_risks, combined_v1, resolve_rest
from .families import attention_sites
from .fragility_blocks import BlockModules, block_modules, norm_epsilon
from .fragility_contexts import attention_implementation, evaluating, ieee_float32
from .fragility_recorder import BlockRecorder, rows_of_mask
from .layer import GeoScaleLayer
from .softcap import softcap_attention_forward

NAME = "geoscale_fragility"
"""The attention that records, on transformers' attention and mask interfaces; models run with it during a probe only."""

WARM_ROUNDS = 2
"""Power-iteration rounds on a weight whose vector an earlier probe left."""

CONDITION_FLOOR = 1e-6
"""Added to σ_min in v1's cond(W) (published)."""

_recorders: "WeakKeyDictionary[nn.Module, BlockRecorder]" = WeakKeyDictionary()


def _recording_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """SDPA (plain PyTorch with a soft cap), whose operands the layer's recorder sees."""
    recorder = _recorders[module]
    scaling = recorder.modules.site.softmax_scale if scaling is None else scaling
    softcap, window = kwargs.get("softcap"), kwargs.get("sliding_window")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    visible, bias = rows_of_mask(attention_mask, causal, window)
    recorder.attend(
        AttentionCall(
            query.detach(),
            key.detach(),
            value.detach(),
            scaling,
            lambda rows: visible(rows, key.shape[2]),
            bias,
            recorder.tokens,
            softcap,
        )
    )
    attend = sdpa_attention_forward if softcap is None else softcap_attention_forward
    return attend(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, _recording_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class FragilityProbe:
    """Reads the fragility of a model as often as asked; keeps power-iteration vectors of the weights between calls.

    Args:
        model: a decoder of a supported family, patched or not, or a PEFT model of one.
        precision: of the attention.
        rest: of norms and linear layers; None: BF16 beside FP8, else `precision`.
        norms: "exact" reads every row's logits, in blocks; "sampled" estimates ‖S‖_F and ‖P‖_F from 16 rows a head.
        v1: also the quantities of the first version, which need singular values of the weights: seconds for a small model.
    Raises:
        UnsupportedModelError: see `attention_sites`. ValueError: an unknown precision or `norms`.
    """

    def __init__(
        self,
        model: Any,
        precision: Precision = "bfloat16",
        rest: Precision | None = None,
        norms: Norms = "exact",
        v1: bool = True,
    ):
        if norms not in ("exact", "sampled"):
            raise ValueError(f"norms must be 'exact' or 'sampled', got {norms!r}")
        self.rest = resolve_rest(precision, rest)
        self.model, self.precision, self.norms, self.v1 = model, precision, norms, v1
        base = model.get_base_model() if type(model).__module__.startswith("peft.") else model
        self.blocks: list[BlockModules] = [block_modules(site) for site in attention_sites(base)]
        self.vectors: dict[tuple[int, str], Tensor] = {}

    def report(self, batch: Tensor | Mapping[str, Any]) -> FragilityReport:
        """Run one forward without gradient, in evaluation mode and the model's own dtype, and measure it in float32.

        The forward uses SDPA, on a patched model too. Nothing of the model has changed afterwards.

        Args:
            batch: input ids (B, L), or the keyword arguments of the model's forward (labels are left out); a 2D
                `attention_mask` says what is padding.
        Raises:
            TypeError: neither. ValueError: no tokens. UnsupportedModelError: weights that cannot be read, or an attention that
                never reached transformers' attention interface.
        """
        inputs = self._inputs(batch)
        mask = inputs.get("attention_mask")
        tokens = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        recorders = [BlockRecorder(block, tokens, self.norms, self.v1) for block in self.blocks]
        with ExitStack() as stack:
            for context in (
                torch.no_grad(),
                ieee_float32(),
                evaluating(self.model),
                attention_implementation(self.model, NAME),
            ):
                stack.enter_context(context)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for recorder in recorders:
                stack.callback(recorder.remove)
                recorder.install()
                _recorders[recorder.modules.site.attention] = recorder
                stack.callback(_recorders.pop, recorder.modules.site.attention, None)
            self.model(**inputs, use_cache=False)
            with torch.autocast(next(self.model.parameters()).device.type, enabled=False):
                for recorder in recorders:
                    self._read_weights(recorder)
        return self._combine(recorders, inputs, tokens)

    def _inputs(self, batch: Any) -> dict[str, Any]:
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        if not isinstance(batch, Mapping) or not any(isinstance(v, Tensor) for v in batch.values()):
            raise TypeError(
                f"batch must be input ids (B, L) or a mapping of the model's inputs, got {type(batch).__name__}; "
                "pass tokenizer(text, return_tensors='pt')"
            )
        device = next(self.model.parameters()).device
        ignored = ("labels", "use_cache", "past_key_values", "num_items_in_batch")
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k not in ignored}
        first = next(v for v in inputs.values() if isinstance(v, Tensor))
        if first.dim() < 2 or first.numel() == 0:
            raise ValueError(f"the batch must hold tokens in the shape (B, L), got {tuple(first.shape)}")
        return inputs

    def _sigma(self, layer: int, name: str, matrix: Tensor) -> Tensor:
        """σ of a weight (out, in), from below; () float64."""
        vectors, rounds = self.vectors.get((layer, name)), WARM_ROUNDS
        if vectors is None or vectors.shape[-1] != matrix.shape[1] or vectors.device != matrix.device:
            vectors, rounds = start_vectors(1, matrix.shape[1], matrix.device), COLD_ROUNDS
        sigma, self.vectors[layer, name] = power_iteration(matrix[None], vectors, rounds)
        return sigma[0]

    def _read_weights(self, recorder: BlockRecorder) -> None:
        """Remainder and, with v1, the conditions of the weights."""
        block, found = recorder.modules, recorder.found
        layer = block.site.layer
        if "d_smx" not in found:
            raise UnsupportedModelError(
                f"{block.site.describe('the attention')} never reached transformers' attention interface, so its q, k and v cannot "
                "be seen; another library may have replaced its forward"
            )
        weights = {"output": block.weight(block.output, "the output projection")}
        if block.mlp_output is not None:
            weights["mlp_in"] = torch.cat([block.weight(m, "the MLP's first layer") for m in block.mlp_inputs])
            weights["mlp_out"] = block.weight(block.mlp_output, "the MLP's last layer")
        sigmas = {name: self._sigma(layer, name, weight) for name, weight in weights.items()}
        found["output_sigma"] = sigmas["output"]
        remainder = sigmas["output"] * found["attended"]
        if (
            block.mlp_output is None
        ):  # experts, whose weights are not read: the branch's own norm stands for both products
            found["remainder_magnitude"] = remainder + 2 * found["mlp_branch"]
            return
        found["remainder_magnitude"] = (
            remainder + sigmas["mlp_in"] * found["mlp_input"] + sigmas["mlp_out"] * found["activation"]
        )
        if self.v1:
            found["kappa_eff"] = torch.stack([_condition(weight) for weight in weights.values()]).sum()

    def _combine(self, recorders: list[BlockRecorder], inputs: dict, tokens: Tensor | None) -> FragilityReport:
        rows = [self._row(recorder) for recorder in recorders]
        final_norm = rows[-1].pop("final_norm")
        for row in rows[:-1]:
            row.pop("final_norm")
        if not all(math.isfinite(row["remainder_magnitude"]) for row in rows):
            self.vectors.clear()  # of weights that may be reloaded
        add_risks(rows, final_norm, self.precision, self.rest)
        count = int(tokens.sum()) if tokens is not None else _token_count(inputs)
        predicted = sum(row["risk"] for row in rows)
        v1 = combined_v1(rows, self.precision) if self.v1 else None
        return FragilityReport(rows, self.precision, self.rest, predicted, v1, final_norm, count)

    def _row(self, recorder: BlockRecorder) -> dict:
        block = recorder.modules
        found = _to_floats(recorder.found)
        for name in ("attended", "mlp_input", "activation", "mlp_branch"):
            found.pop(name, None)
        patched = block.site.attention.__dict__.get("geoscale")
        bound = patched.geometry.logit_bound if isinstance(patched, GeoScaleLayer) and patched.geometry else None
        row: dict[str, Any] = {"layer": block.site.layer, "family": block.site.family}
        row |= {"mlp": "unread" if block.mlp_output is None else "dense"}
        row |= dict.fromkeys(("kappa_score", "kappa_softmax_v1", "kappa_value", "kappa_eff", "c_norm", "rho_norm"))
        row |= found
        row["logit_bound"] = None if bound is None else float(bound.amax())
        row.setdefault("norm_magnitude", 0.0)
        if self.v1 and recorder.norm_spread:
            row |= _norm_conditions(recorder, self.rest)
        return row


def _token_count(inputs: dict) -> int:
    shape = next(v for v in inputs.values() if isinstance(v, Tensor)).shape
    return shape[0] * shape[1]


def _to_floats(found: dict[str, Tensor]) -> dict[str, float]:
    """One transfer from the device."""
    device = found["d_smx"].device
    values = torch.stack([value.detach().to(device, torch.float64) for value in found.values()]).tolist()
    return dict(zip(found, values, strict=True))


def _condition(weight: Tensor) -> Tensor:
    """cond(W) = σ_max/(σ_min + floor), through the smaller Gram matrix in float64, on the CPU."""
    weight = weight.double()
    gram = weight @ weight.mT if weight.shape[0] < weight.shape[1] else weight.mT @ weight
    gram = gram.cpu()
    if not bool(torch.isfinite(gram).all()):
        return gram.new_tensor(torch.nan)
    squared = torch.linalg.eigvalsh(gram).clamp_min(0)
    return squared[-1].sqrt() / (squared[0].sqrt() + CONDITION_FLOOR)


def _norm_conditions(recorder: BlockRecorder, rest: str) -> dict[str, float]:
    """C_LN = σ/√ε + σ²/ε + 1 and ρ_LN = (σ²/ε)·d·ε_mach of the block's norm layers: the largest and the smallest."""
    spreads = torch.stack([spread for _, spread in recorder.norm_spread]).tolist()
    width = recorder.modules.weight(recorder.modules.output, "the output projection").shape[0]
    ratios = [spread / norm_epsilon(norm) for (norm, _), spread in zip(recorder.norm_spread, spreads, strict=True)]
    return {
        "c_norm": max(ratio**0.5 + ratio + 1 for ratio in ratios),
        "rho_norm": min(ratios) * width * ROUNDOFFS[rest],
    }


def fragility_report(
    model: Any,
    batch: Tensor | Mapping[str, Any],
    precision: Precision = "bfloat16",
    *,
    rest: Precision | None = None,
    norms: Norms = "exact",
    v1: bool = True,
) -> FragilityReport:
    """Fragility of every layer to low precision, and the predicted mismatch of the logits; see `FragilityProbe` for the rest.

    A first-order estimate by upper bounds: for ranking layers, steps and precisions, not the error's size. How well it ranks
    is what benchmarks/fragility.py measures. Source: arXiv 2510.21770 and its AISTATS 2026 version, from summaries.

    Args:
        model: a decoder of a supported family, patched or not, or a PEFT model of one.
        batch: input ids (B, L), or a mapping of the model's inputs.
        precision: "bfloat16", "float16", "float8_e4m3" (FP8 attention) or "float32".
    """
    return FragilityProbe(model, precision, rest, norms, v1).report(batch)

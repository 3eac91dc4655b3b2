"""The attention layers of a model, and the weights that make their q, k and v."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from ..geometry import Projection
from ..kernels import check_head_dim
from .decoders import FAMILIES
from .norms import gain_and_shift
from .refusals import REFUSED
from .residual import ResidualStream, residual_stream


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer in its model. Modules are looked up at each use, so wrapping or replacing them later is seen."""

    family: str
    layer: int
    block: Any  # the decoder block that holds the norm and the attention
    rotary: tuple[Any, ...]  # the model's rotary embeddings
    stream: ResidualStream | None = None  # what enters the attention where no norm layer precedes it

    @property
    def attention(self) -> Any:
        return getattr(self.block, FAMILIES[self.family].attention)

    @property
    def input_norm(self) -> Any:
        return getattr(self.block, FAMILIES[self.family].input_norm)

    @property
    def head_dim(self) -> int:
        attention = self.attention
        return attention.head_dim if hasattr(attention, "head_dim") else attention.head_size

    def describe(self, name: str) -> str:
        return _describe(self, name)

    def dense_weight(self, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Effective weight and bias of a projection of the attention. Raises UnsupportedModelError."""
        return _dense_weight(self, name, shape)

    def norm(self, norm: Any) -> tuple[Tensor | None, Tensor | None]:
        """Gain and shift of a norm layer, (d,) each or None. Raises UnsupportedModelError."""
        return _norm(self, norm)

    @property
    def softmax_scale(self) -> float:
        return FAMILIES[self.family].softmax_scale(self.attention)

    def projections(self) -> tuple[Projection, Projection, Projection]:
        """The affine maps from the normalised token to q, k and v, with today's weights.

        Raises:
            UnsupportedModelError: a module that hides its effective weight (LoRA, quantised, sharded, unknown norm).
        """
        return FAMILIES[self.family].read(self)

    def parameters(self) -> list[Tensor]:
        """The tensors that the projections are read from."""
        projections = self.projections()
        tensors = [t for p in projections for t in (p.weight, p.bias, p.norm_gain, p.norm_shift) if t is not None]
        # Gains may be derived (1 + weight, a bound of the residual stream): the parameters themselves, too.
        tensors += [p for module in self.weight_modules() for p in module.parameters()]
        return list({(t.data_ptr(), t.shape): t for t in tensors}.values())

    def weight_modules(self) -> list[Any]:
        """Modules whose parameters decide the certificates."""
        modules = [getattr(self.attention, name, None) for name in FAMILIES[self.family].modules]
        before = [self.input_norm] if self.stream is None else self.stream.modules
        return [*before, *(module for module in modules if module is not None)]

    def version(self) -> tuple:
        """Changes whenever a weight is replaced or written in place, and with every step of any torch optimizer.

        (Fused optimizers do not count as writes for torch, hence the steps; writes through `.data` are invisible to both.)
        """
        parameters = [p for module in self.weight_modules() for p in module.parameters()]
        # An inference tensor counts no changes: a new object differs from every earlier version.
        writes = [(p.data_ptr(), object() if p.is_inference() else p._version) for p in parameters]
        return (_optimizer_steps, *writes)


_optimizer_steps = 0  # of any optimizer in this process


def _count_optimizer_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def _describe(site: AttentionSite, name: str) -> str:
    return f"layer {site.layer} of the {site.family} model: {name}"


def _dense_weight(site: AttentionSite, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a projection, once it is sure that they are the effective ones."""
    module: Any = getattr(site.attention, name)
    where = _describe(site, name)
    if hasattr(module, "base_layer"):
        raise UnsupportedModelError(
            f"{where} is a {type(module).__name__} adapter, whose effective weight this release does not certify; "
            "merge it first (model.merge_and_unload()) or unpatch the model"
        )
    if type(module) not in (nn.Linear, Conv1D):
        raise UnsupportedModelError(
            f"{where} is a {type(module).__name__}; only nn.Linear and Conv1D are sure to compute what their weight says"
        )
    weight = module.weight
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"{where} holds {weight.dtype} weights; load the model in bfloat16, float16 or float32"
        )
    if hasattr(weight, "full_tensor") or weight.is_meta:
        raise UnsupportedModelError(
            f"{where} is sharded or on the meta device; patch the model where its weights are whole"
        )
    if type(weight) not in (nn.Parameter, Tensor):
        raise UnsupportedModelError(
            f"{where} keeps its weight as a {type(weight).__name__}, whose values we cannot read"
        )
    if tuple(weight.shape) != shape:
        raise UnsupportedModelError(f"{where} must have a weight of shape {shape}, got {tuple(weight.shape)}")
    return weight, getattr(module, "bias", None)


def _norm(site: AttentionSite, norm: Any) -> tuple[Tensor | None, Tensor | None]:
    """Gain and shift of a norm layer whose output is bounded: (d,) each, or None where it has none."""
    return gain_and_shift(norm, _describe(site, type(norm).__name__))


def attention_sites(model: Any) -> Iterator[AttentionSite]:
    """Every attention layer of a supported model, in order.

    Raises:
        UnsupportedModelError: a family we do not know, cross-attention, an unknown attention class, or a head dimension
            FP8 attention does not have.
    """
    model_type = model.config.model_type
    family = FAMILIES.get(model_type)
    if family is None:
        reason = REFUSED.get(model_type, "its attention geometry is unknown")
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported: {reason}. Supported: {', '.join(sorted(FAMILIES))}. "
            "Pass fallback='sdpa' to leave its attention to SDPA, counted"
        )
    if getattr(model.config, "add_cross_attention", False):
        raise UnsupportedModelError(
            "cross-attention (config.add_cross_attention=True) is not supported: keys come from elsewhere"
        )
    rotary = tuple(m for name, m in model.named_modules() if name.rpartition(".")[2].startswith("rotary_emb"))
    blocks = [m for m in model.modules() if hasattr(m, family.attention) and hasattr(m, family.input_norm)]
    if not blocks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder block with {family.attention} and {family.input_norm}"
        )
    for index, block in enumerate(blocks):
        stream = residual_stream(model, blocks[:index], family.post_norms) if family.post_norms else None
        site = AttentionSite(model_type, index, block, rotary, stream)
        classes = [c.__name__ for c in type(site.attention).__mro__]
        if family.attention_class not in classes:
            raise UnsupportedModelError(
                f"{_describe(site, family.attention)} must be a {family.attention_class}, got {classes[0]}: "
                "custom attention code may not call the attention interface"
            )
        try:
            check_head_dim(site.head_dim)
        except ValueError as error:
            raise UnsupportedModelError(f"{_describe(site, family.attention)}: {error}") from error
        yield site

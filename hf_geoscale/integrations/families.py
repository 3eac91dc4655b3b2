"""The attention layers of a model, and the weights that make their q, k and v."""

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import UnsupportedModelError
from ..geometry import Projection
from ..kernels import check_head_dim
from .calls import check_forward, hooks_before, watch_hooks
from .decoders import FAMILIES
from .norms import gain_and_shift
from .placement import where_measured
from .refusals import REFUSED
from .residual import ResidualStream, residual_stream
from .rotary import rotary_embeddings, rotary_state
from .sharding import attribute, shards_followed, submodules
from .upward import Upward, upward_to
from .versions import Identities, module_versions, plain_versions
from .weights import EffectiveWeight, effective_weight


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer in its model. Modules are looked up at each use, so wrapping or replacing them later is seen.

    None of the modules around the layer is kept alive. A layer that was copied or pickled alone has no model; an attention on its
    own has no block either, and keeps the norm layer that it had.
    """

    family: str
    layer: int
    own: Upward  # to the attention
    upward: Upward  # to the decoder block that holds the norm and the attention
    home: Upward  # to the model
    norm_layer: Any  # of the block
    rotary_paths: tuple[tuple[str, ...], ...]  # from the model to its rotary embeddings
    rotary_found: tuple[Any, ...]  # those of a layer on its own
    stream: ResidualStream | None = None  # what enters the attention where no norm layer precedes it

    @property
    def attention(self) -> Any:
        return self.own.target()

    @property
    def block(self) -> Any:
        """None for an attention on its own."""
        return self.upward.target()

    @property
    def rotary(self) -> tuple[Any, ...]:
        """The model's rotary embeddings, as they are now; those found at patching for a layer on its own."""
        if (model := self.home.target()) is None:
            return self.rotary_found
        found: list[Any] = []
        for path in self.rotary_paths:
            module = model
            for name in path:
                module = module._modules[name]
            found += (module,)
        return tuple(found)

    @property
    def model(self) -> Any:
        """None for a layer without its model."""
        return self.home.target()

    @property
    def is_whole(self) -> bool:
        """Whether all modules around the attention that decide its certificates are known."""
        return self.block is not None and self.model is not None

    @property
    def input_norm(self) -> Any:
        block = self.block
        return self.norm_layer if block is None else attribute(block, FAMILIES[self.family].input_norm)

    @property
    def head_dim(self) -> int:
        attention = self.attention
        return attention.head_dim if hasattr(attention, "head_dim") else attention.head_size

    def describe(self, name: str) -> str:
        return _describe(self, name)

    def weight(self, name: str, shape: tuple[int, int], token: tuple[Tensor | None, Tensor | None]) -> EffectiveWeight:
        """What a projection of the attention computes from tokens of this gain and shift. Raises UnsupportedModelError."""
        return effective_weight(attribute(self.attention, name), self.describe(name), shape, *token)

    def norm(self, norm: Any) -> tuple[Tensor | None, Tensor | None]:
        """Gain and shift of a norm layer, (d,) each or None. Raises UnsupportedModelError."""
        return gain_and_shift(norm, self.describe(type(norm).__name__))

    @property
    def softmax_scale(self) -> float:
        return FAMILIES[self.family].softmax_scale(self.attention)

    def projections(self) -> tuple[Projection, Projection, Projection]:
        """The affine maps from the normalised token to q, k and v, with today's weights, on the device that measures them.

        Raises:
            UnsupportedModelError: an unknown norm, adapter or quantisation, or a sharded weight.
        """
        with where_measured(self.weight_modules()):
            return FAMILIES[self.family].read(self)

    def parameters(self) -> list[Tensor]:
        """The unquantised parameters that decide the projections."""
        owners = submodules(self.weight_modules())
        parameters = [p for owner in owners for p in owner._parameters.values() if p is not None]
        return [p for p in parameters if p.is_floating_point() and not type(p).__module__.startswith("torchao.")]

    def weight_modules(self) -> list[Any]:
        """Modules whose parameters decide the certificates."""
        attention = self.attention
        modules = [attribute(attention, name) for name in FAMILIES[self.family].modules]
        before = [self.input_norm] if self.stream is None else self.stream.modules
        return [*before, *(module for module in modules if module is not None)]

    def version(self, modules: list[Any] | None = None) -> tuple:
        """Changes with every write, replacement or change of adapters (see `module_versions`) and of mode, and with every step
        of any torch optimizer (fused ones do not count as writes for torch).

        In evaluation mode the weights' bits count too, so that writes through `.data` are seen.

        Args:
            modules: `weight_modules()`, where the caller has them.
        """
        training, modules = self.attention.training, modules or self.weight_modules()
        plain = plain_versions(modules) if training and not shards_followed() else None
        if plain is not None:
            return (_optimizer_steps if plain[0] else None, training, *self._around(), *plain[1])
        owners = submodules(modules)
        trainable = _is_trainable(owners)
        steps = _optimizer_steps if trainable else None  # optimizers move nothing else
        return (steps, training, *self._around(), *module_versions(owners, contents=not training))

    def _around(self) -> tuple:
        """Hooks in front of the attention, and the rotary embeddings."""
        rotary = self.rotary
        return (*hooks_before(self.attention), Identities(rotary), *rotary_state(rotary))

    def watch_calls(self) -> None:
        """From now on refuse a hook in front of the attention that changes the tokens which it gets."""
        watch_hooks(self.attention, self.describe("the attention"), before_only=True)
        if (block := self.block) is not None:
            check_forward(block, self.describe(type(block).__name__))


def _is_trainable(modules: Iterable[Any]) -> bool:
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                return True
    return False


_optimizer_steps = 0  # of any optimizer in this process


def _count_optimizer_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def _describe(site: AttentionSite, name: str) -> str:
    return f"layer {site.layer} of the {site.family} model: {name}"


def _bypasses_interface(kind: type) -> bool:
    """Whether a class of transformers calls torch's attention by itself, as those of some families did up to release 4."""
    forward: Any = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return (
        getattr(forward, "__module__", "").startswith("transformers.")
        and "ALL_ATTENTION_FUNCTIONS" not in names
        and ("super" not in names or "scaled_dot_product_attention" in names)
    )


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
    rotary = dict(rotary_embeddings(model))
    found = tuple(tuple(name.split(".")) for name in rotary), tuple(rotary.values())
    blocks = [m for m in model.modules() if hasattr(m, family.attention) and hasattr(m, family.input_norm)]
    if not blocks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder block with {family.attention} and {family.input_norm}"
        )
    home, upwards = upward_to(model), [upward_to(block) for block in blocks]
    for index, block in enumerate(blocks):
        stream = residual_stream(home, upwards[:index], family.post_norms) if family.post_norms else None
        attention, norm = attribute(block, family.attention), attribute(block, family.input_norm)
        own = upward_to(attention)
        site = AttentionSite(model_type, index, own, upwards[index], home, norm, *found, stream)
        if getattr(block, "do_layer_norm_before", True) is False:  # OPT-350m
            raise UnsupportedModelError(
                f"{_describe(site, family.input_norm)} follows the attention (do_layer_norm_before=False), so nothing bounds "
                "q, k and v"
            )
        classes = [c.__name__ for c in type(site.attention).__mro__]
        if family.attention_class not in classes:
            raise UnsupportedModelError(
                f"{_describe(site, family.attention)} must be a {family.attention_class}, got {classes[0]}: "
                "custom attention code may not call the attention interface"
            )
        if _bypasses_interface(type(site.attention)):
            raise UnsupportedModelError(
                f"{_describe(site, family.attention)} is a {classes[0]}, which in transformers {transformers.__version__} calls "
                "torch's attention itself and never the attention interface. Upgrade transformers, or leave the model unpatched"
            )
        try:
            check_head_dim(site.head_dim)
        except ValueError as error:
            raise UnsupportedModelError(f"{_describe(site, family.attention)}: {error}") from error
        yield site

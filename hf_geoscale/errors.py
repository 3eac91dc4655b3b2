"""The project's own errors; each message says what was expected, what came and what to do."""


class UnsupportedModelError(ValueError):
    """A model whose attention geometry we cannot read: unknown family, quantised, sharded or wrapped projections."""


class UnsupportedAttentionError(ValueError):
    """An attention call we cannot honour exactly: a mask, soft cap, bias or output that FP8 attention does not have."""


class NonFiniteWeightsError(ValueError):
    """Weights holding NaN or Inf: they have no certificate."""

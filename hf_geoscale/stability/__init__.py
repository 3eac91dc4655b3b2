"""Training stability from the geometry of weights and logits; torch only."""

from .qk_clip import clip_factors
from .quack import LogitChangeControl
from .slices import HeadSlices, LogitWeights

__all__ = ["HeadSlices", "LogitChangeControl", "LogitWeights", "clip_factors"]

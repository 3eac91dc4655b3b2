"""Companion methods: training stability from the geometry of weights, logits and gradients; torch only."""

from .fragility import AttentionCall as AttentionCall
from .fragility import attention_fragility as attention_fragility
from .fragility import norm_magnitude as norm_magnitude
from .fragility_control import EarlyWarning as EarlyWarning
from .fragility_control import NormEpsilonController as NormEpsilonController
from .fragility_risk import FragilityReport as FragilityReport
from .qk_clip import clip_factors as clip_factors
from .quack import LogitChangeControl as LogitChangeControl
from .slices import HeadSlices as HeadSlices
from .slices import LogitWeights as LogitWeights
from .span import SpanScaling as SpanScaling
from .span import scale_span_gradients as scale_span_gradients

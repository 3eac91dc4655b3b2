"""Companion methods for stable low-precision training; torch only."""

from .fragility import AttentionCall as AttentionCall
from .fragility import attention_fragility as attention_fragility
from .fragility import norm_magnitude as norm_magnitude
from .fragility_control import EarlyWarning as EarlyWarning
from .fragility_control import NormEpsilonController as NormEpsilonController
from .fragility_risk import FragilityReport as FragilityReport

"""Companion methods that watch or steer a training run: fragility diagnostics, logit-change control, span scaling."""

from .span import SpanScaling as SpanScaling
from .span import scale_span_gradients as scale_span_gradients

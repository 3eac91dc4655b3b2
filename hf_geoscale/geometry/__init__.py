"""Spectral norms, certificates and the rank-aware bound; torch only."""

from .certificates import UNIT_ROUNDOFF, Projection, entry_bound, logit_bound, norm_bound, operand_bound
from .layer import LayerGeometry, LayerMaps, measure_interaction, measure_layer, measure_layers
from .placement import has_float64, measuring_device
from .rank_aware import alpha_min, rank_aware_gain, typicality_gamma
from .spectral import (
    gram,
    interaction_power_iteration,
    interaction_sigma_upper,
    looseness,
    power_iteration,
    sigma_upper,
    start_vectors,
    trace_power_bound,
)
from .steady import SteadyBatch
from .tensor_cores import MatrixKernels

__all__ = [
    "UNIT_ROUNDOFF",
    "LayerGeometry",
    "LayerMaps",
    "MatrixKernels",
    "Projection",
    "SteadyBatch",
    "alpha_min",
    "entry_bound",
    "gram",
    "has_float64",
    "interaction_power_iteration",
    "interaction_sigma_upper",
    "logit_bound",
    "looseness",
    "measure_interaction",
    "measure_layer",
    "measure_layers",
    "measuring_device",
    "norm_bound",
    "operand_bound",
    "power_iteration",
    "rank_aware_gain",
    "sigma_upper",
    "start_vectors",
    "trace_power_bound",
    "typicality_gamma",
]

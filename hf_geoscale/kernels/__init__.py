"""FP8 attention kernels: scales come in as tensors, nothing here knows weights or models."""

from .attention import fp8_attention
from .checks import check_head_dim
from .hadamard import hadamard
from .statistics import AttentionStatistics
from .visibility import Visibility, key_range_of_block

__all__ = ["AttentionStatistics", "Visibility", "check_head_dim", "fp8_attention", "hadamard", "key_range_of_block"]

"""The modes that benchmarks/accuracy.py compares."""

REFERENCE = "bf16"
UNPATCHED = {REFERENCE: "sdpa", "eager": "eager"}
"""BF16 modes: transformers' attention implementation."""
FP8: dict[str, dict] = {
    "operands": {},
    "high": {"precision": "high"},
    "logits": {"quantize_logits": True},
}
"""FP8 modes: overrides of GeoScaleConfig."""

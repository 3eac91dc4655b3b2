"""Every tolerance of the test-suite, and where it comes from."""

import math

E4M3_STEP = 2.0**-4
"""Half an E4M3 epsilon: the relative rounding error of one normal number."""

E4M3_NOISE = E4M3_STEP / 3**0.5
"""Root mean square of a rounding error uniform within ± half a step, at the coarse end of a binade."""

OUTPUT_ERROR = 2 * E4M3_NOISE
"""Relative error (norms) of O: v and P̃ each add one rounding, q and k two in the exponent (small logits): ≤ 2 × one."""

GRADIENT_ERROR = 4 * E4M3_NOISE
"""Relative error of dQ, dK, dV: up to six rounded factors (P̃, dO′, v, dS, k or q) with independent errors, √6 ≈ 2.4 × one,
times up to 1.6 for the cancellation in dP − δ."""

FLOAT32_ROUNDOFF = 2e-6
"""Relative difference of float32 results summed in another order, lengths up to a few hundred."""

SQNR_FLOOR_DB = 18.0
"""Signal to noise of the attention output in decibels: −20·log10(OUTPUT_ERROR) = 22.8, less 5 dB for peaked softmax rows."""

FLIPPED_ROUNDINGS = 1e-3
"""Relative change of an attention output when float32 round-off moves some P̃ across a tie of E4M3: about one in 10⁵ lies that
close (2⁻²³·|S| of a 2⁻³ step), each moves by 2⁻³: √10⁻⁵·2⁻³ = 4e-4, with a factor of 2.5."""

BF16_LOSSES = 2.0**-8
"""Relative difference of losses over a few steps whose gradients were rounded to BF16 (unit roundoff 2⁻⁸) in other sums."""

FLOAT64_ROUNDOFF = 1e-9
"""Relative slack of comparisons with a float64 singular-value decomposition."""

SMOLLM2_LOSS_GAP = 0.015
SMOLLM2_KL = 0.012
"""Nats per token against float32 on 4 × 1,024 tokens of English; the reference data flow measures +0.008 and 0.008, and +0.009 and
0.008 on the first sequence, which is tested."""

SMOLLM2_GRADIENTS = {"O": 0.068, "dQ": 0.109, "dK": 0.108, "dV": 0.059}
"""Relative error on SmolLM2's activations, mean over eight layers: this data flow's first measurement, on another text and other
layers (.056, .093, .093, .045), plus two standard errors of the difference of two means over eight layers. Single layers spread by
.012, .016, .015 and .014 (docs/gradient_error.md), so that is 2·√2·spread/√8 = one spread. Tested on 512 tokens:
.060, .093, .088, .053, where all 1,024 give .061, .094, .095, .052 over all layers."""

FP8_OVER_BF16 = 16.0
"""Ratio of the unit roundoffs of E4M3 (2⁻⁴) and BF16 (2⁻⁸): FP8 attention's error is at most that of BF16 attention times this."""

FUSED_ERROR = E4M3_NOISE
"""Fused kernels against the reference: P̃ is rounded against the running row maximum instead of the final one, which moves P̃8 (and,
through δ, dS8) by up to one independent rounding."""

FUSED_RUNS = 2 * FUSED_ERROR
"""Between outputs, or gradients, of two fused runs whose P̃ is rounded against other running maxima (tiles start at other keys in
packed or padded rows, or in a window's cache), or whose q and k are rounded to BF16 before RoPE in one and after it in the other:
each is within FUSED_ERROR of the reference, so by the triangle inequality they are within twice that of each other."""

FUSED_LOGITS = 2.0**-8
"""Relative change of the largest |logit| against the reference: products of q8 and k8 are exact and their sums differ by float32
round-off, but sums in another order inside the Hadamard mix flip a few roundings of q8 and k8. Observed: 2⁻¹⁰."""


def matrix_unit_error(dim: int) -> float:
    """Root-mean-square error of an H100's logits over their root mean square.

    Its matrix unit shifts products to the exponent of the largest and cuts them off after 13 bits (docs/kernels.md). Where one
    product is most of the sum, each of `dim` loses up to 2⁻¹³ of it, uniformly and with its own sign: √(dim/3)·2⁻¹³, 5.6e-4 and
    8.0e-4 at 64 and 128. Measured 2.4e-4 to 4.4e-4. Triton's interpreter and the reference sum in float32.
    """
    return math.sqrt(dim / 3) * 2.0**-13


COHERENT_ERROR = 0.005
"""Relative error of O and dV where rows attend nearly evenly, and values and gradients have a mean. A goal. Roundings of
like terms average out there, and BF16 rounds the result by 2⁻⁹/√3 = .001 to .002: the rest is for the sums.
"""

OVER_SPECIFICATION = 1.1
"""Largest ratio of a kernel's error and the specification's on the same input, both against float64. A goal: sums add less
than a tenth to the cost of E4M3.
"""

FRAGILITY_FLOAT32 = 2.0**-14
"""Relative error of fragility quantities against float64: norms and products in float32 of sums of at most 10⁴ terms, whose
round-off grows like √n·2⁻²⁴ = 2⁻¹⁷, times about eight such factors."""

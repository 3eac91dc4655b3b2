"""From the fragility of layers to a prediction for the model: transport, downstream gain, risk and their sum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

Precision = Literal["bfloat16", "float16", "float8_e4m3", "float32"]

ROUNDOFFS: dict[str, float] = {
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8_e4m3": 2.0**-4,
}
"""Unit round-off of rounding to nearest; the published list, and E4M3 (three mantissa bits), which is ours."""


def check_precision(name: str, value: str) -> None:
    """Raise ValueError unless `value` is a `Precision`."""
    if value not in ROUNDOFFS:
        raise ValueError(f"{name} must be one of {get_args(Precision)}, got {value!r}")


def resolve_rest(precision: str, rest: str | None) -> str:
    """What norms and linear layers run in where the caller does not say: BF16 beside FP8 attention, else the same as it.

    Raises:
        ValueError: an unknown precision.
    """
    check_precision("precision", precision)
    if rest is None:
        return "bfloat16" if precision == "float8_e4m3" else precision
    check_precision("rest", rest)
    return rest


def transport(attention_gain: float, mlp_gain: float) -> float:
    """ρ = a + m(1 + a): a perturbation of the residual stream leaves a layer at most (1 + a)(1 + m) = 1 + ρ times as large."""
    return attention_gain + mlp_gain * (1 + attention_gain)


def downstream(transports: Sequence[float]) -> list[float]:
    """Π_{j>l}(1 + ρ_j) of every layer l."""
    gains, product = [], 1.0
    for rho in reversed(transports):
        gains.append(product)
        product *= 1 + rho
    return gains[::-1]


def add_risks(rows: list[dict], final_norm: float, precision: str, rest: str) -> None:
    """Put `transport`, `downstream` and `risk` into the rows, which are of consecutive layers.

    risk_l = (ε·attention + ε_rest·(norm + remainder))_l/‖h_final‖·downstream_l; published with one ε for both.
    """
    for row in rows:
        row["transport"] = transport(row["attention_gain"], row["mlp_gain"])
    epsilon, epsilon_rest = ROUNDOFFS[precision], ROUNDOFFS[rest]
    for row, gain in zip(rows, downstream([row["transport"] for row in rows]), strict=True):
        local = epsilon * row["attention_magnitude"]
        local += epsilon_rest * (row["norm_magnitude"] + row["remainder_magnitude"])
        row["downstream"] = gain
        row["risk"] = local / final_norm * gain


def combined_v1(rows: list[dict], precision: str) -> float | None:
    """v1's predictor ε·Σ_l [κ_softmax(1 + κ_score)κ(V)‖W_O‖₂ + κ_eff + C_LN]; None where a row lacks a quantity of it.

    κ_eff is read from dense MLPs only.
    """
    if any(row.get("kappa_score") is None or row.get("kappa_eff") is None for row in rows):
        return None
    total = 0.0
    for row in rows:
        attention = row["kappa_softmax_v1"] * (1 + row["kappa_score"]) * row["kappa_value"] * row["output_sigma"]
        total += attention + row["kappa_eff"] + row["c_norm"]
    return ROUNDOFFS[precision] * total


@dataclass(frozen=True)
class FragilityReport:
    """Rows of `fragility_report`, one a layer, and the predictors they add up to.

    Each row: `layer`, `family`; of the attention `d_smx`, `kappa_softmax`, `chi_score`, `value_sigma`, `score_norm`,
    `probability_norm`, `entropy` (nats a row); `attention_magnitude`, `norm_magnitude`, `remainder_magnitude`; `attention_gain`
    and `mlp_gain` (norm of a branch over that of what it is added to), `transport`, `downstream`, `risk`; `output_sigma` (‖W_O‖₂),
    `mlp` ("dense", or "unread" for experts); v1's `kappa_score`, `kappa_softmax_v1`, `kappa_value`, `kappa_eff`, `c_norm`,
    `rho_norm` (None where not asked for, or not read); `logit_bound` of a patched layer, else None.

    Args:
        precision: of the attention.
        rest: of norms and linear layers.
        predicted: Σ risk, an estimate of ‖y_low − y_FP32‖/‖y_FP32‖ up to a constant factor; it is a sum of bounds.
        predicted_v1: v1's sum, or None.
        final_norm: ‖h_final‖_F, of the residual stream that leaves the last layer.
        tokens: of the batch, padding excluded.
    """

    rows: list[dict]
    precision: str
    rest: str
    predicted: float
    predicted_v1: float | None
    final_norm: float
    tokens: int

    COLUMNS: ClassVar[dict[str, str]] = {
        "layer": "layer",
        "d_smx": "D_smx",
        "kappa_softmax": "κ_softmax",
        "chi_score": "χ_score",
        "attention_magnitude": "attention",
        "norm_magnitude": "norm",
        "remainder_magnitude": "remainder",
        "transport": "transport ρ",
        "downstream": "downstream",
        "risk": "risk",
        "kappa_score": "κ_score (v1)",
        "kappa_softmax_v1": "κ_softmax (v1)",
        "kappa_value": "κ(V) (v1)",
        "kappa_eff": "κ_eff (v1)",
        "c_norm": "C_LN (v1)",
        "rho_norm": "ρ_LN (v1)",
    }

    @property
    def worst_layer(self) -> int:
        """The layer of the largest risk."""
        return max(self.rows, key=lambda row: row["risk"])["layer"]

    def at(self, precision: Precision, rest: Precision | None = None) -> "FragilityReport":
        """The same measurement in another precision; see `fragility_report`. Raises ValueError for an unknown one."""
        rest_name = resolve_rest(precision, rest)
        rows = [dict(row) for row in self.rows]
        add_risks(rows, self.final_norm, precision, rest_name)
        for row in rows:
            if row.get("rho_norm") is not None:
                row["rho_norm"] *= ROUNDOFFS[rest_name] / ROUNDOFFS[self.rest]
        v1 = None if self.predicted_v1 is None else combined_v1(rows, precision)
        predicted = sum(row["risk"] for row in rows)
        return FragilityReport(rows, precision, rest_name, predicted, v1, self.final_norm, self.tokens)

    def to_markdown(self) -> str:
        """A table, a row a layer, and a line with the sums."""
        lines = [list(self.COLUMNS.values()), ["---"] * len(self.COLUMNS)]
        lines += [[_cell(row.get(name)) for name in self.COLUMNS] for row in self.rows]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        v1 = "" if self.predicted_v1 is None else f", v1 predictor {self.predicted_v1:.3g}"
        return (
            f"{table}\nAttention in {self.precision}, the rest in {self.rest}, {self.tokens} tokens: "
            f"sum of risks {self.predicted:.3g}{v1}.\n"
        )


def _cell(value: float | int | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.3g}"

"""The three sources of scales behind one protocol."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from hf_geoscale import GeoScaleConfig
from hf_geoscale.config import AutoAlpha, Delayed
from hf_geoscale.geometry import Projection, measure_layer
from hf_geoscale.scaling import E4M3, CurrentScaling, DelayedScaling, GeometryScaling, QuantScales, strategy_of

from ..conftest import here

HEADS, KV_HEADS = 4, 2


def geometry(factor: float = 1.0, interaction: bool = True):
    weight = factor * torch.randn(HEADS, 16, 32, generator=torch.Generator().manual_seed(0))
    p, kv = Projection(weight), Projection(weight[:KV_HEADS])
    return measure_layer(p, kv, kv, 0.25, interaction=interaction)


@dataclass
class Call:
    """A call whose operands have these largest magnitudes."""

    q: float = 2.0
    logit: float = 3.0
    softcap: float | None = None
    device: torch.device = field(default_factory=here)
    heads: tuple[int, int] = (HEADS, KV_HEADS)

    def amax(self) -> dict[str, Tensor]:
        return {"q": torch.linspace(1, self.q, HEADS), "k": torch.ones(KV_HEADS), "v": torch.ones(KV_HEADS)}

    def logit_amax(self, scales: QuantScales) -> Tensor:
        return torch.full((HEADS,), self.logit)

    def seen(self) -> dict[str, Tensor]:
        return {**self.amax(), "logit": self.logit_amax(None)}


CONFIGS = {
    "certified": GeoScaleConfig(),
    "certified logits": GeoScaleConfig(quantize_logits=True),
    "rank-aware": GeoScaleConfig(quantize_logits=True, bound="rank_aware"),
    "auto-α": GeoScaleConfig(quantize_logits=True, bound="auto_alpha", auto_alpha=AutoAlpha(burn_in=2)),
    "delayed": GeoScaleConfig(scaling="delayed", quantize_logits=True),
    "current": GeoScaleConfig(scaling="current", quantize_logits=True),
}


@pytest.mark.parametrize("name", CONFIGS)
class TestLaws:
    def test_scales_are_finite_positive_and_of_the_right_shape(self, name):
        scaling = strategy_of(CONFIGS[name], alpha=0.1)
        for factor in (1.0, 0.0, 30.0):
            scaling.refresh(geometry(factor))
            for amax in (2.0, 0.0, 1e30):
                call = Call(amax, amax)
                scales = scaling.quant_scales(call)
                scaling.observe(call.seen())
                given = [scales.q, scales.k, scales.v]
                assert [x.shape for x in given] == [(HEADS,), (KV_HEADS,), (KV_HEADS,)]
                if CONFIGS[name].quantize_logits:
                    assert scales.logit.shape == (HEADS,)
                    given.append(scales.logit)
                else:
                    assert scales.logit is None
                assert all(x.dtype == torch.float32 and bool((torch.isfinite(x) & (x > 0)).all()) for x in given)

    def test_scales_hold_still_between_a_forward_and_its_recomputation(self, name):
        """With gradients, and the same weights: whatever was observed in between."""
        scaling = strategy_of(CONFIGS[name], alpha=0.1)
        scaling.refresh(geometry())
        first = scaling.quant_scales(Call())
        for _ in range(3):
            scaling.observe(Call(100.0, 100.0).seen())
        again = scaling.quant_scales(Call())
        assert torch.equal(first.q, again.q)
        assert first.logit is None or torch.equal(first.logit, again.logit)


class TestGeometry:
    @pytest.mark.parametrize("headroom", [1.0, 4.0])
    def test_scale_maps_the_certificate_to_the_largest_number(self, headroom):
        scaling, layer = GeometryScaling(headroom, quantize_logits=True), geometry()
        scaling.refresh(layer)
        scales = scaling.quant_scales(Call())
        for scale, bound in ((scales.q, layer.q_bound), (scales.v, layer.v_bound), (scales.logit, layer.logit_bound)):
            torch.testing.assert_close(
                scale.double() * bound * headroom, torch.full(bound.shape, E4M3.max, dtype=torch.float64)
            )

    @pytest.mark.feature("soft cap")
    @pytest.mark.parametrize("bound", ["certified", "rank_aware", "auto_alpha"])
    @pytest.mark.parametrize("headroom", [1.0, 4.0])
    def test_a_soft_cap_bounds_logits_too(self, bound, headroom):
        """min(bound, cap): a tight cap sets the scale, a wide one leaves it to the weights, and q, k, v never see it."""
        scaling = GeometryScaling(headroom, quantize_logits=True, bound=bound, alpha=0.1)
        scaling.refresh(geometry())
        plain = scaling.quant_scales(Call())
        tight, wide = scaling.quant_scales(Call(softcap=0.01)), scaling.quant_scales(Call(softcap=1e5))
        torch.testing.assert_close(tight.logit * headroom * 0.01, torch.full((HEADS,), E4M3.max))
        assert (
            float((tight.logit * headroom * 0.01).amax()) < E4M3.max
        )  # round-off cannot carry a logit at the cap over it
        assert torch.equal(wide.logit, plain.logit)
        assert all(torch.equal(getattr(tight, name), getattr(plain, name)) for name in "qkv")
        assert torch.equal(scaling.quant_scales(Call()).logit, plain.logit)  # of that call alone

    def test_data_never_reaches_a_scale(self):
        scaling = GeometryScaling(quantize_logits=True)
        scaling.refresh(geometry())
        with torch.no_grad():
            before = scaling.quant_scales(Call())
            scaling.observe(Call(1e30, 1e30).seen())
            after = scaling.quant_scales(Call(1e30, 1e30))
        assert torch.equal(before.q, after.q)
        assert torch.equal(before.logit, after.logit)

    def test_rank_aware_is_alpha_times_the_worst_case(self):
        scaling, layer = GeometryScaling(2.0, True, "rank_aware", alpha=0.1), geometry()
        scaling.refresh(layer)
        expected = E4M3.max / (2.0 * 0.1 * layer.worst_case_logit)
        torch.testing.assert_close(scaling.quant_scales(Call()).logit.double(), expected, rtol=1e-6, atol=0)

    def test_auto_alpha_burns_in_then_keeps_a_margin_over_what_it_saw(self):
        layer = geometry()
        options = AutoAlpha(burn_in=3, quantile=0.5, margin=1.5, floor=1e-6)
        scaling = GeometryScaling(quantize_logits=True, bound="auto_alpha", auto_alpha=options)
        scaling.refresh(layer)
        worst = layer.worst_case_logit
        burn_in = scaling.quant_scales(Call()).logit
        torch.testing.assert_close(burn_in.double(), E4M3.max / worst, rtol=1e-6, atol=0)
        for share in (0.01, 0.03, 0.02):
            scaling.observe({"logit": (share * worst).float()})
        scaling.refresh(layer)
        torch.testing.assert_close(
            scaling.quant_scales(Call()).logit.double(), E4M3.max / (1.5 * 0.02 * worst), rtol=1e-5, atol=0
        )
        scaling.observe({"logit": worst.float()})  # the burn-in is over
        scaling.refresh(layer)
        assert float(scaling.alpha) == pytest.approx(0.03, rel=1e-5)

    @pytest.mark.parametrize(("share", "alpha"), [(1e-9, 0.02), (0.9, 1.0)])
    def test_auto_alpha_is_clipped(self, share, alpha):
        scaling = strategy_of(CONFIGS["auto-α"])
        layer = geometry()
        scaling.refresh(layer)
        for _ in range(2):
            scaling.observe({"logit": (share * layer.worst_case_logit).float()})
        with torch.no_grad():
            scaling.quant_scales(Call())
        assert float(scaling.alpha) == pytest.approx(alpha)

    def test_missing_pieces_are_named(self):
        with pytest.raises(RuntimeError, match="refresh"):
            GeometryScaling().quant_scales(Call())
        with pytest.raises(ValueError, match="interaction=True"):
            GeometryScaling(quantize_logits=True, bound="rank_aware", alpha=0.1).refresh(geometry(interaction=False))
        with pytest.raises(ValueError, match="needs alpha"):
            GeometryScaling(quantize_logits=True, bound="rank_aware")


class TestDelayed:
    def run(self, options: Delayed, amaxes: list[float]) -> list[float]:
        """Scales of q before each call with these largest magnitudes, without gradients."""
        scaling, scales = DelayedScaling(options), []
        with torch.no_grad():
            for amax in amaxes:
                scales.append(float(scaling.quant_scales(Call()).q[0]))
                scaling.observe(Call(amax).seen())
        return scales

    def test_history_of_maxima(self):
        scales = self.run(Delayed(history=2), [7.0, 14.0, 3.5, 3.5, 3.5])
        assert scales == pytest.approx([1.0, 64.0, 32.0, 32.0, 128.0])

    def test_most_recent_and_margin(self):
        assert self.run(Delayed(reduction="most_recent", margin=1), [7.0, 14.0, 3.5]) == pytest.approx([1, 32, 16])

    def test_zero_and_non_finite_histories_leave_the_scale(self):
        most_recent = Delayed(history=1, reduction="most_recent")
        assert self.run(most_recent, [7.0, float("nan"), 7.0, float("inf"), 7.0]) == pytest.approx([1, 64, 64, 64, 64])

    def test_with_gradients_scales_move_when_the_weights_do(self):
        scaling = DelayedScaling(Delayed(history=4))
        scaling.observe(Call(7.0).seen())
        assert float(scaling.quant_scales(Call()).q[0]) == 1.0
        scaling.refresh(geometry())
        assert float(scaling.quant_scales(Call()).q[0]) == 64.0

    def test_state_goes_through_a_checkpoint(self):
        scaling, other = (DelayedScaling(Delayed(history=3), quantize_logits=True) for _ in range(2))
        scaling.observe(Call(7.0).seen())
        scaling.refresh(geometry())
        other.load_state_dict(scaling.state_dict())
        assert torch.equal(other.quant_scales(Call()).logit, scaling.quant_scales(Call()).logit)
        with pytest.raises(ValueError, match=r"history.*got"):
            DelayedScaling(Delayed(history=4), quantize_logits=True).load_state_dict(scaling.state_dict())
        with pytest.raises(ValueError, match="logit"):
            other.load_state_dict(DelayedScaling(Delayed(history=3)).state_dict())


class TestCurrent:
    def test_the_largest_value_becomes_the_largest_number(self):
        scales = CurrentScaling(quantize_logits=True).quant_scales(Call(2.0, 3.0))
        assert float(scales.q[0] * 2.0) == pytest.approx(448, rel=1e-5)
        assert float(scales.logit[0] * 3.0) == pytest.approx(448, rel=1e-5)
        assert float(scales.logit[0] * 3.0) <= 448


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": "rank_aware"}, "quantize_logits=True"),
        ({"bound": "auto_alpha", "quantize_logits": True, "scaling": "delayed"}, "scaling='delayed'"),
        ({"scaling": "amax"}, "'amax'"),
    ],
)
def test_combinations_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GeoScaleConfig(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoAlpha(burn_in=0), "burn_in.*got 0"),
        (lambda: AutoAlpha(floor=0.0), r"floor.*got 0\.0"),
        (lambda: AutoAlpha(quantile=1.1), r"quantile.*got 1\.1"),
        (lambda: AutoAlpha(margin=0.5), r"margin.*got 0\.5"),
        (lambda: Delayed(history=0), "history.*got 0"),
        (lambda: Delayed(reduction="mean"), "reduction.*'mean'"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

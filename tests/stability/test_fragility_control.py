"""The early warning and the controller of ε: when they act, their limits, and that they can be undone."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from torch import nn

from hf_geoscale import EarlyWarning, NormEpsilonController


def test_the_warning_compares_the_running_maximum_with_its_own_past():
    warning = EarlyWarning(span=2, warm_up=3, ratio=1.5)
    assert not any(warning.observe(x) for x in (1.0, 1.2, 0.9, 1.1))  # maxima 1.2, 1.2, 1.1: three of the past
    assert not warning.observe(1.79)  # 1.5 × the median 1.2 is 1.8
    assert warning.observe(1.81)
    assert warning.observe(0.1)  # the running maximum still holds the last value


def test_no_warning_before_its_past_is_long_enough():
    warning = EarlyWarning(span=1, warm_up=4, ratio=1.9)
    assert [warning.observe(x) for x in (1.0, 100.0, 1.0, 100.0, 1000.0)] == [False, False, False, False, True]


def test_the_past_is_forgotten():
    series = [1.0] * 4 + [1.8] * 8 + [3.2]
    long, short = EarlyWarning(1, 2, 100, 2.0), EarlyWarning(1, 2, 4, 2.0)
    assert [x for x in series if long.observe(x)] == []
    assert len(short.past) == 0
    for x in series:
        short.observe(x)
    assert list(short.past) == [1.8, 1.8, 1.8, 3.2]
    assert short.observe(3.7)
    assert not long.observe(3.59)


def test_a_value_that_is_not_finite_warns_at_once_and_is_no_past():
    warning = EarlyWarning(span=1)
    assert warning.observe(float("nan"))
    assert warning.observe(float("inf"))
    assert not warning.past


def test_a_series_that_only_falls_never_warns():
    warning = EarlyWarning(span=3, warm_up=2, ratio=1.01)
    assert not any(warning.observe(10.0 / (1 + i)) for i in range(50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"span": 0}, "span and warm_up must be at least 1 observation, got 0 and 24"),
        ({"memory": 3}, "memory must be at least warm_up, 24 observations, got 3"),
        ({"ratio": 1.0}, "ratio must be above 1, got 1.0"),
    ],
)
def test_the_warning_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        EarlyWarning(**options)


def norms(layers: int, epsilon: float = 1e-6):
    return [[nn.LayerNorm(4, eps=epsilon), SimpleNamespace(variance_epsilon=epsilon)] for _ in range(layers)]


def fed(controller: NormEpsilonController, modules, observations: int, risks=None) -> list[list[int]]:
    base = risks or [1.0] * len(modules)
    return [controller.observe([x * (1 + 0.01 * (i % 5)) for x in base], modules) for i in range(observations)]


def test_it_waits_then_raises_the_layers_that_left_their_past():
    controller, modules = NormEpsilonController(warm_up=24), norms(3)
    assert fed(controller, modules, 24) == [[]] * 24
    assert controller.observe([1.0, 9.0, 1.0], modules) == [1]
    assert modules[1][0].eps == modules[1][1].variance_epsilon == 4e-5  # from the base 1e-5
    assert modules[0][0].eps == modules[2][1].variance_epsilon == 1e-6
    controller.restore()
    assert modules[1][0].eps == modules[1][1].variance_epsilon == 1e-6


def test_the_percentile_is_of_the_layers_own_past():
    controller, modules = NormEpsilonController(warm_up=10, percentile=80.0), norms(2)
    for i in range(10):
        controller.observe([1.0 + i, 100.0 * (1 + i)], modules)
    assert controller.observe([8.1, 810.0], modules) == []  # the 80th percentile of 1…10 is 8.2
    assert controller.observe([8.6, 500.0], modules) == [0]


def test_the_limits_a_step_and_in_all_and_the_cooldown():
    controller, modules = NormEpsilonController(warm_up=3, cooldown=2, total=7, cap=1.0), norms(4)
    fed(controller, modules, 3)
    raised = [controller.observe([2.0 ** (i + 1)] * 4, modules) for i in range(40)]
    assert max(map(len, raised)) == 2
    assert len(controller.actions) == 7
    mine = [[when for when, layer in controller.actions if layer == x] for x in range(4)]
    assert max(map(len, mine)) > 1
    assert all(b - a > 2 for times in mine for a, b in pairwise(times))


def test_the_limit_a_layer():
    controller, modules = NormEpsilonController(warm_up=3, cooldown=0, per_layer=3, cap=1.0), norms(1)
    fed(controller, modules, 3)
    raised = [controller.observe([2.0 ** (i + 1)], modules) for i in range(10)]
    assert raised == [[0]] * 3 + [[]] * 7


def test_epsilon_stops_at_the_cap_and_comes_back_exactly():
    controller, modules = NormEpsilonController(warm_up=2, cooldown=0, cap=1e-4), norms(1, epsilon=3e-5)
    fed(controller, modules, 2)
    for i in range(9):
        controller.observe([10.0 ** (i + 1)], modules)
    assert modules[0][0].eps == 1e-4
    assert len(controller.actions) == 1  # at the cap nothing is left to do
    controller.restore()
    assert modules[0][0].eps == 3e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentile": 100.0}, r"percentile must lie in \(0, 100\), got 100.0"),
        ({"factor": 1.0}, "factor must be above 1, got 1.0"),
        ({"base": 1.0}, "must satisfy 0 < base <= cap, got 1.0 and 0.01"),
        ({"total": -1}, "total must not be negative, got -1"),
    ],
)
def test_the_controller_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        NormEpsilonController(**options)


def test_risks_and_norms_must_be_of_the_same_layers():
    with pytest.raises(ValueError, match="got 2 lists and 1 risks"):
        NormEpsilonController().observe([1.0], norms(2))

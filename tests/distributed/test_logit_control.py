"""QuacK and QK-Clip on two processes: the same training as on one, with one collective a step for all layers."""

import pytest
import torch

from ..tolerances import FLOAT32_ROUNDOFF
from . import logit_scenarios

LOSSES = 1e-4
"""Relative, after a few large steps: AdamW divides gradients that are nearly 0, whose round-off differs by process count."""

WEIGHTS = 5e-3
"""Root mean square of the difference over that of the weights, for the same reason."""


def assert_same_training(together: list[dict], alone: dict) -> None:
    assert together[0]["losses"] == together[1]["losses"] == pytest.approx(alone["losses"], rel=LOSSES)
    assert together[0]["losses"][-1] < together[0]["losses"][0] - 0.1
    for name, expected in alone["weights"].items():
        first, second = (process["weights"][name] for process in together)
        assert torch.equal(first, second), name
        assert (first - expected).norm() <= WEIGHTS * expected.norm(), name


class TestQuacK:
    @pytest.fixture(scope="class")
    def alone(self, one):
        return one.run(logit_scenarios.control, "none")[0]

    @pytest.mark.parametrize(("strategy", "collectives"), [("fsdp2", [1]), ("ddp", [])])
    def test_training_is_that_of_one_process(self, two, alone, strategy, collectives):
        together = two.run(logit_scenarios.control, strategy)
        assert_same_training(together, alone)
        assert together[0]["collectives"] == together[1]["collectives"] == collectives
        assert torch.equal(together[0]["factors"], together[1]["factors"])
        torch.testing.assert_close(together[0]["factors"], alone["factors"], rtol=WEIGHTS, atol=0)
        assert (alone["factors"] - 1).abs().max() > 0.1  # the factors did something

    def test_a_distributed_checkpoint_keeps_the_norms_at_the_start(self, two, tmp_path):
        for found in two.run(logit_scenarios.resume, str(tmp_path)):
            assert found["kept"][0] == found["kept"][1]
            assert found["found"] == pytest.approx(found["expected"], rel=FLOAT32_ROUNDOFF)

    def test_wrapped_before_accelerate_shards_the_model(self, two, alone):
        together = two.run(logit_scenarios.prepared_by_accelerate)
        assert together[0]["sharded"]
        assert together[0]["losses"] == together[1]["losses"] == pytest.approx(alone["losses"], rel=LOSSES)
        torch.testing.assert_close(together[0]["factors"], alone["factors"], rtol=WEIGHTS, atol=0)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_clipping_takes_the_largest_logit_of_all_processes(one, two, strategy):
    alone = one.run(logit_scenarios.clip, "none")[0]
    together = two.run(logit_scenarios.clip, strategy)
    assert_same_training(together, alone)
    assert together[0]["clipped"] == together[1]["clipped"] == alone["clipped"] > 0


def test_rows_that_do_not_divide(two):
    weight = torch.arange(20.0).view(5, 4)
    norms = torch.stack([weight[:2].norm(), weight[2:4].norm()]).double()
    expected = weight * torch.tensor([2.0, 2.0, 3.0, 3.0, 1.0])[:, None]
    for found in two.run(logit_scenarios.uneven):
        torch.testing.assert_close(found["norms"], norms, rtol=FLOAT32_ROUNDOFF, atol=0)
        assert torch.equal(found["weight"], expected)


def test_refusals(two):
    for found in two.run(logit_scenarios.refusals):
        assert "q_proj.weight must be whole, or sharded along dimension 0 as FSDP2 does" in found["tensor parallelism"]
        assert "Tensor parallelism is not supported" in found["tensor parallelism"]
        assert "FSDP2 has sharded these: use QKClip(source='observed')" in found["certificates"]

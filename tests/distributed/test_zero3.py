"""DeepSpeed ZeRO-3 on two processes: the training of one process, and scales of the weights as they are."""

import re

import pytest
import torch

from ..conftest import tiny_model
from ..tolerances import FLIPPED_ROUNDINGS, FLOAT32_ROUNDOFF
from . import zero3_scenarios
from .processes import Processes

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.feature("DeepSpeed ZeRO-3")

OPTIONS = {
    "float32": {},
    "persistent": {"stage3_param_persistence_threshold": 100_000},
    "gradient checkpointing": {"checkpointing": True},
    "LoRA": {"lora": True},
}


@pytest.fixture(scope="module")
def zero3(device):
    """Processes of their own: what DeepSpeed replaces in torch stays replaced."""
    processes = Processes(2, device)
    yield processes
    processes.stop()


class TestTraining:
    @pytest.fixture(scope="class", params=OPTIONS)
    def options(self, request):
        return OPTIONS[request.param]

    @pytest.fixture(scope="class")
    def together(self, zero3, options):
        if options.get("lora"):
            pytest.importorskip("peft")
        return zero3.run(zero3_scenarios.train, **options)

    def test_losses_are_those_of_one_process(self, one, options, together):
        alone = one.run(zero3_scenarios.alone, lora=options.get("lora", False))[0]
        assert together[0]["losses"] == together[1]["losses"]
        assert together[0]["losses"][0] == pytest.approx(alone[0], rel=FLOAT32_ROUNDOFF)
        assert together[0]["losses"] == pytest.approx(alone, rel=FLIPPED_ROUNDINGS)
        assert together[0]["losses"][-1] < together[0]["losses"][0] - (0.1 if "lora" in options else 1)

    def test_scales_are_those_of_the_whole_weights(self, together):
        for process in together:
            for used, due in zip(process["scales"], process["due"], strict=True):
                assert all(map(torch.equal, used, due))
        assert not torch.equal(together[0]["scales"][0][0], together[0]["scales"][-1][0])

    def test_scales_are_the_same_bits_on_both(self, together):
        for first, second in zip(*(process["scales"] for process in together), strict=True):
            assert all(map(torch.equal, first, second))

    def test_one_measurement_a_step(self, options, together):
        for process in together:
            assert process["measured"] == [(1, 1)] * 4
            assert process["calls"] == [8, 8] if options.get("checkpointing") else [4, 4]

    def test_one_layer_is_whole_at_a_time(self, options, together):
        if "stage3_param_persistence_threshold" not in options:
            assert together[0]["whole"] == together[1]["whole"] == []


def test_every_write_is_noticed_and_nothing_else(zero3):
    for found in zero3.run(zero3_scenarios.writes):
        expected = {name: (True, count) for name, (_, count) in zero3_scenarios.WRITES.items()}
        evaluation = {"evaluation": (True, 1), "evaluation again": (True, 0), "unseen, in evaluation": (True, 1)}
        assert found == expected | evaluation | {"row": ([], 4)}


def test_loaded_in_parts(zero3, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    for found in zero3.run(zero3_scenarios.loaded_in_parts, str(tmp_path)):
        assert found == {"absent": True, "measured while patching": False, "fresh": True}


def test_accelerates_plugin(zero3):
    first, second = zero3.run(zero3_scenarios.prepared_by_accelerate)
    assert first["engine"] == "DeepSpeedEngine"
    assert first["losses"] == second["losses"]
    assert first["losses"][-1] < first["losses"][0] - 0.5
    assert first["measured"] == second["measured"] == [1, 1, 1]
    for a, b in zip(first["scales"], second["scales"], strict=True):
        assert all(map(torch.equal, a, b))
    assert not torch.equal(first["scales"][0][0], first["scales"][-1][0])


def test_unpatching_and_patching_again(zero3):
    first, second = zero3.run(zero3_scenarios.unpatched)
    assert first["losses"] == second["losses"]
    assert first["losses"] == sorted(first["losses"], reverse=True)
    assert first["error"] < 1e-5
    assert first["calls"] == [2, 2]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("patched late", "layer 0 is partitioned by DeepSpeed ZeRO-3.*call patch_model before accelerator.prepare"),
        ("never prepared", "layer 0 is partitioned by DeepSpeed ZeRO-3, and not gathered.*accelerator.prepare"),
        ("rank-aware", "layer 0.*partitioned by DeepSpeed ZeRO-3.*patch the model where its weights are whole"),
        ("residual stream", "v is bounded by the embedding.*which DeepSpeed ZeRO-3 has sharded again.*Use DDP"),
    ],
)
def test_refusals(zero3, what, message):
    for answer in zero3.run(zero3_scenarios.refusal, what):
        assert re.search(message, answer), answer

"""Training on two processes equals training on one, with the same scales on both and no collective of ours."""

import re

import pytest
import torch

from ..tolerances import BF16_LOSSES, FLIPPED_ROUNDINGS, FLOAT32_ROUNDOFF
from . import scenarios, shard_scenarios

OPTIONS = {
    "float32": {},
    "gradient checkpointing": {"checkpointing": True},
    "bf16, gradient checkpointing": {"bf16": True, "checkpointing": True},
}


class DataParallelLaws:
    """What holds for every way to train on several processes."""

    strategy: str

    @pytest.fixture(scope="class")
    def alone(self, one, options):
        return one.run(scenarios.train, self.strategy if "bf16" in options else "none", **options)[0]

    @pytest.fixture(scope="class")
    def together(self, two, options):
        return two.run(scenarios.train, self.strategy, **options)

    def test_losses_are_those_of_one_process(self, options, alone, together):
        assert together[0]["losses"] == together[1]["losses"]
        assert together[0]["losses"][0] == pytest.approx(alone["losses"][0], rel=FLOAT32_ROUNDOFF)
        later = BF16_LOSSES if "bf16" in options else FLIPPED_ROUNDINGS
        assert together[0]["losses"] == pytest.approx(alone["losses"], rel=later)
        assert together[0]["losses"][-1] < together[0]["losses"][0] - 1  # it did train

    def test_scales_are_the_same_bits_on_both(self, together):
        for first, second in zip(*(process["scales"] for process in together), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(together[0]["scales"][0][0], together[0]["scales"][-1][0])

    def test_no_collective_of_ours(self, two, options, together):
        unpatched = two.run(scenarios.train, self.strategy, steps=1, patched=False, **options)
        for ours, theirs in zip(together, unpatched, strict=True):
            assert ours["collectives"] == theirs["collectives"]
            assert sum(ours["collectives"].values()) > 0 or self.strategy == "ddp"  # DDP's own are not dispatched

    def test_one_measurement_a_step(self, options, together):
        """Recomputation under gradient checkpointing measures nothing: its weights are those of the forward."""
        for process in together:
            for measured in process["measured"][1:]:
                assert (measured[0], measured[1]) == (1, 1)
            assert process["calls"] == [8, 8] if options.get("checkpointing") else [4, 4]


@pytest.mark.feature("DDP")
class TestDDP(DataParallelLaws):
    strategy = "ddp"

    @pytest.fixture(scope="class", params=["float32"])
    def options(self, request):
        return OPTIONS[request.param]


@pytest.mark.feature("FSDP2")
class TestFSDP2(DataParallelLaws):
    strategy = "fsdp2"

    @pytest.fixture(scope="class", params=OPTIONS)
    def options(self, request):
        return OPTIONS[request.param]

    def test_one_layer_is_whole_at_a_time(self, together):
        for process in together:
            assert all(measured["most whole"] == 1 for measured in process["measured"])


@pytest.mark.feature("FSDP2")
class TestShards:
    @pytest.mark.parametrize("when", ["before", "after", "meta"])
    def test_patching_before_or_after_sharding(self, two, when):
        first, second = two.run(shard_scenarios.order, when)
        assert first == second
        assert first["fresh"]
        assert first["measured while patching"] == (when == "before")
        assert first["sigma_upper"] == []  # would need whole weights
        assert len(first["q_bound"]) == 4
        assert first["σ upper in the table"] == "–"

    @pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
    def test_every_write_is_noticed_and_nothing_else(self, two, reshard):
        for found in two.run(shard_scenarios.writes, reshard):
            fresh = {name: (fresh, measured) for name, (fresh, measured, _) in found.items()}
            assert fresh == dict.fromkeys(shard_scenarios.WRITES, (True, 1))
            again = {name: again for name, (*_, again) in found.items()}
            # Gathered by hand after a write: measured once more when the shards are seen again.
            assert again == dict.fromkeys(shard_scenarios.WRITES, 0) | {"write, then unshard by hand": 1}

    @pytest.mark.parametrize(("lr", "measured"), [(1e-6, [1, 0, 0, 1, 0]), (0.5, [1, 1, 1, 1, 1])])
    def test_scheduled_refreshes_keep_the_headroom(self, one, two, lr, measured):
        first, second = two.run(shard_scenarios.scheduled, "fsdp2", lr)
        assert first["measured"] == second["measured"] == measured
        assert first["headroom"] == 4.0
        assert all(first["covered"]) == all(second["covered"]) == (lr < 0.1)
        for a, b in zip(first["scales"], second["scales"], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def test_resume_from_a_checkpoint(self, two, tmp_path):
        for expected, resumed in two.run(shard_scenarios.resume, str(tmp_path)):
            assert resumed == expected


@pytest.mark.feature("tensor parallelism", refused=True)
def test_tensor_parallelism_is_refused(two):
    for answer in two.run(shard_scenarios.refusal, "tensor parallel"):
        assert re.search(r"layer 1.*sharded by tensor parallelism.*without a tp_plan", answer), answer


def test_fsdp2_of_a_model_with_the_name_alone_is_refused(two):
    for answer in two.run(shard_scenarios.refusal, "name alone"):
        assert "FSDP2 has sharded it before its first forward" in answer
        assert "Add the line hf_geoscale.patch_model(model) before fully_shard" in answer


@pytest.mark.feature("FSDP2")
def test_a_projection_sharded_by_itself_is_refused(two):
    for answer in two.run(shard_scenarios.refusal, "projection"):
        assert re.search(r"layer 1 is sharded \(a DTensor\) while.*fsdp_transformer_layer_cls_to_wrap", answer), answer


@pytest.mark.gpu
@pytest.mark.feature("FSDP1", refused=True)
@pytest.mark.parametrize("what", ["FSDP1", "FSDP1, flat"])
def test_fsdp1_is_refused(two, device, what):
    if device == "cpu":
        pytest.skip("FSDP1 needs a GPU")
    for answer in two.run(shard_scenarios.refusal, what):
        assert re.search("FSDP1.*fsdp_version: 2", answer), answer

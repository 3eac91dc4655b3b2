"""Which checkpoint a run goes on from, decided by its files; which folders are refused."""

import json
import shutil

import pytest
import torch
from transformers import Trainer

from hf_geoscale.cli.failures import InputError
from hf_geoscale.cli.results import RunMetrics
from hf_geoscale.cli.run_folder import check_folder, checkpoint_problem, last_whole_checkpoint, set_aside

from .conftest import refused, run
from .test_weight_files import cut

SHORT = ("--length", 16, "--steps", 6, "--eval-sequences", 1, "--save-steps", 2)


@pytest.fixture(scope="module")
def finished(tiny_folder, text_file, tmp_path_factory):
    """A finished run of 6 steps with its checkpoints 4 and 6, and its command."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    command = ("finetune", tiny_folder, "--text", text_file, *SHORT)
    result = run(*command, "--output", output)
    assert result.exit_code == 0, result.output
    return output, command


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


@pytest.fixture
def steps_trained(monkeypatch):
    steps, original = [], Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: steps.append(1) or original(*args, **kwargs))
    return steps


NEEDED = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def test_a_checkpoint_of_the_trainer_is_whole(finished):
    for step in (4, 6):
        assert checkpoint_problem(finished[0] / "checkpoints" / f"checkpoint-{step}", 10) is None


@pytest.mark.parametrize("how", ["missing", "half", "empty"])
@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_with_a_broken_file_is_not(copy, name, how):
    checkpoint = copy / "checkpoints" / "checkpoint-6"
    if how == "missing":
        (checkpoint / name).unlink()
    else:
        cut(checkpoint / name, 0.5 if how == "half" else 0)
    problem = checkpoint_problem(checkpoint, 10)
    assert name in problem or "holds no weights" in problem


@pytest.mark.parametrize("state", ["[]", "{}", '{"global_step": "6"}', "null"])
def test_a_state_of_something_else(copy, state):
    (copy / "checkpoints" / "checkpoint-6" / "trainer_state.json").write_text(state)
    assert "trainer_state.json is damaged" in checkpoint_problem(copy / "checkpoints" / "checkpoint-6", 10)


def test_after_the_last_step_the_optimizer_is_not_needed(copy):
    (copy / "checkpoints" / "checkpoint-6" / "optimizer.pt").unlink()
    assert checkpoint_problem(copy / "checkpoints" / "checkpoint-6", 6) is None
    assert "optimizer.pt is missing" in checkpoint_problem(copy / "checkpoints" / "checkpoint-6", 7)


def test_the_last_whole_one_is_taken_and_the_others_are_set_aside(copy):
    folder = copy / "checkpoints"
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-10")  # by number, not by name
    (folder / "checkpoint-best").mkdir()
    last, skipped = last_whole_checkpoint(copy, 20)
    assert last == folder / "checkpoint-10"
    assert list(skipped) == [folder / "checkpoint-6"]
    assert (folder / "checkpoint-6").exists()
    (folder / "incomplete-checkpoint-6").mkdir()  # of an earlier kill
    set_aside(folder / "checkpoint-6")
    assert (folder / "incomplete-checkpoint-6").is_dir()
    assert not (folder / "checkpoint-6").exists()
    assert last_whole_checkpoint(copy / "nothing", 20) == (None, {})


class TestResume:
    def test_of_a_finished_run_does_nothing_and_says_so(self, finished, steps_trained):
        output, command = finished
        before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in output.rglob("*")}
        result = run(*command, "--output", output, "--resume")
        assert result.exit_code == 0
        assert f"{output} is finished: all 6 steps are done, nothing to do" in result.stdout
        assert steps_trained == []
        assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in output.rglob("*")} == before

    def test_takes_the_last_whole_checkpoint(self, finished, copy, steps_trained):
        """As a kill leaves it that came while checkpoint-6 was written."""
        output, command = finished
        (copy / "metrics.json").unlink()
        (copy / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
        result = run(*command, "--output", copy, "--resume")
        assert result.exit_code == 0, result.output
        assert "checkpoint-6 is not whole" in result.stdout
        assert "trainer_state.json is missing" in result.stdout
        assert (copy / "checkpoints" / "incomplete-checkpoint-6").is_dir()
        assert "resuming from checkpoint-4" in result.stdout
        assert len(steps_trained) == 2
        ours, theirs = RunMetrics.read(copy), RunMetrics.read(output)
        assert ours.losses == theirs.losses
        assert ours.eval_after == theirs.eval_after

    def test_without_a_whole_checkpoint_starts_anew(self, finished, copy, steps_trained):
        output, command = finished
        (copy / "metrics.json").unlink()
        for step in (4, 6):
            cut(copy / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")
        result = run(*command, "--output", copy, "--resume")
        assert result.exit_code == 0, result.output
        assert "no whole checkpoint: the run starts anew" in result.stdout
        assert len(steps_trained) == 6
        assert RunMetrics.read(copy).losses == RunMetrics.read(output).losses

    def test_after_the_last_step_evaluates_and_writes(self, finished, copy, steps_trained):
        """As a kill leaves it that came between the last checkpoint and the results."""
        output, command = finished
        (copy / "metrics.json").unlink()
        shutil.rmtree(copy / "model")
        result = run(*command, "--output", copy, "--resume")
        assert result.exit_code == 0, result.output
        assert steps_trained == []
        ours, theirs = RunMetrics.read(copy), RunMetrics.read(output)
        assert (ours.losses, ours.eval_before, ours.eval_after) == (
            theirs.losses,
            theirs.eval_before,
            theirs.eval_after,
        )
        assert (copy / "model" / "model.safetensors").read_bytes() == (
            output / "model" / "model.safetensors"
        ).read_bytes()

    def test_writes_a_model_that_is_missing(self, finished, copy, steps_trained):
        command = finished[1]
        shutil.rmtree(copy / "model")
        assert run(*command, "--output", copy, "--resume").exit_code == 0
        assert steps_trained == []
        assert (copy / "model" / "model.safetensors").exists()
        shutil.rmtree(copy / "model")
        shutil.rmtree(copy / "checkpoints")
        said = refused(*command, "--output", copy, "--resume")
        assert "its model was not written" in said
        assert "no checkpoint of step 6" in said
        assert run(*command, "--output", copy, "--resume", "--no-save-model").exit_code == 0

    def test_of_a_folder_that_is_not_there_starts(self, finished, tmp_path):
        result = run(*finished[1], "--output", tmp_path / "new", "--resume")
        assert result.exit_code == 0, result.output
        assert "the run starts anew" in result.stdout
        assert RunMetrics.read(tmp_path / "new").losses == RunMetrics.read(finished[0]).losses

    def test_settings_of_an_earlier_release_are_complete(self, finished, copy):
        """Releases before --split wrote none."""
        settings = json.loads((copy / "settings.json").read_text())
        del settings["split"]
        (copy / "settings.json").write_text(json.dumps(settings))
        assert run(*finished[1], "--output", copy, "--resume").exit_code == 0
        (copy / "settings.json").write_text("{")
        assert "settings.json cannot be read" in refused(*finished[1], "--output", copy, "--resume")


class TestFolder:
    @pytest.mark.parametrize("command", ["finetune", "transients"])
    def test_a_file_is_no_folder(self, tiny_folder, text_file, tmp_path, command):
        path = tmp_path / "file"
        path.write_text("mine")
        for output in (path, path / "below"):
            said = refused(command, tiny_folder, "--text", text_file, "--output", output)
            assert f"{path} is a file" in said
            assert f"--output {output}" in said
        assert path.read_text() == "mine"

    def test_one_that_cannot_be_written_to(self, tmp_path, monkeypatch):
        monkeypatch.setattr("os.access", lambda *_: False)
        with pytest.raises(InputError, match=f"{tmp_path} cannot be written to"):
            check_folder(tmp_path / "new" / "deep")

    def test_relative_ones(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        check_folder(tmp_path.relative_to(tmp_path) / "new")
        assert list(tmp_path.iterdir()) == []


def test_resumed_checkpoints_of_the_optimizer_are_readable_as_torch_left_them(finished):
    """The check of wholeness looks at the directory of the zip files; torch still writes such."""
    checkpoint = finished[0] / "checkpoints" / "checkpoint-4"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (checkpoint / name).read_bytes().startswith(b"PK")
        torch.load(checkpoint / name, weights_only=False)

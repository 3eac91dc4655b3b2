"""What a run leaves behind: numbers first, whatever ends it; the card; the plot; the comparison."""

import csv
import json
import math
import os
import resource
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors import SafetensorError
from transformers import Trainer

from hf_geoscale.cli import card as cards
from hf_geoscale.cli.failures import InputError
from hf_geoscale.cli.results import RunMetrics, loss_gap, read_baseline, write_results, write_whole

from .conftest import refused, run

SHORT = ("--length", 16, "--steps", 4, "--eval-sequences", 1)


@pytest.fixture(scope="module")
def command(tiny_folder, text_file):
    return ("finetune", tiny_folder, "--text", text_file, *SHORT)


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    assert run(*command, "--output", output).exit_code == 0
    return output


@pytest.fixture
def file_limit():
    """Files of this process end at so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def has_results(output, steps):
    assert len(list(csv.DictReader((output / "metrics.csv").open()))) == steps
    assert (output / "README.md").read_text().startswith("---")
    return RunMetrics.read(output)


class TestFullDisk:
    def test_at_the_model_keeps_the_results(self, command, finished, tmp_path, file_limit):
        size = (finished / "model/model.safetensors").stat().st_size
        file_limit(size // 2)
        said = refused(*command, "--output", tmp_path)
        assert f"{tmp_path}/model could not be written (File too large" in said
        assert "No checkpoint holds it" in said
        metrics = has_results(tmp_path, 4)
        assert metrics.losses == RunMetrics.read(finished).losses
        assert metrics.eval_after == RunMetrics.read(finished).eval_after
        assert not list(tmp_path.glob("model*"))

    def test_at_a_checkpoint_keeps_the_steps(self, command, finished, tmp_path, file_limit):
        size = (finished / "model/model.safetensors").stat().st_size
        file_limit(int(size * 1.5))  # the model fits, the optimizer, twice its size, does not
        said = refused(*command, "--output", tmp_path, "--save-steps", 2)
        assert "could not be written after step 2" in said
        assert f"Metrics of 2 steps are in {tmp_path}" in said
        assert "--resume" in said
        assert has_results(tmp_path, 2).outcome == "failed"
        file_limit(resource.RLIM_INFINITY)
        result = run(*command, "--output", tmp_path, "--save-steps", 2, "--resume")
        assert result.exit_code == 0, result.output
        assert RunMetrics.read(tmp_path).losses == RunMetrics.read(finished).losses

    def test_at_the_model_with_a_checkpoint_resume_writes_it(self, command, finished, tmp_path, monkeypatch):
        def full(*_, **__):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        original = Trainer.save_model
        monkeypatch.setattr(
            Trainer, "save_model", lambda self, d=None, **kw: (original if "checkpoint-" in d else full)(self, d, **kw)
        )
        said = refused(*command, "--output", tmp_path, "--save-steps", 4)
        assert "No space left on device" in said
        assert "--resume, which wins over --overwrite: " in said
        assert "checkpoint-4 holds it" in said
        monkeypatch.undo()
        assert run(*command, "--output", tmp_path, "--save-steps", 4, "--resume").exit_code == 0
        assert (tmp_path / "model/model.safetensors").read_bytes() == (
            finished / "model/model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("scaling", ["geometry", "none"])
def test_a_diverged_run_leaves_everything_but_a_model(tiny_folder, text_file, tmp_path, scaling):
    options = ("--length", 16, "--steps", 6, "--eval-sequences", 1, "--learning-rate", 1e30, "--scaling", scaling)
    command = ("finetune", tiny_folder, "--text", text_file, "--output", tmp_path, *options)
    said = refused(*command)
    metrics = has_results(tmp_path, 2 if scaling == "geometry" else 6)
    assert metrics.outcome == "diverged"
    assert all(map(math.isfinite, metrics.losses[: metrics.diverged_at - 1]))
    assert scaling == "geometry" or not math.isfinite(metrics.losses[metrics.diverged_at - 1])
    assert f"diverged in step {metrics.diverged_at}" in said
    assert str(tmp_path) in said
    if scaling == "geometry":
        assert "the weights that make q in layer 0 hold NaN or Inf)" in said
    pytest.importorskip("matplotlib")
    assert (tmp_path / "loss.png").exists()
    assert f"**This run diverged in step {metrics.diverged_at}" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "model").exists()
    again = refused(*command, "--resume")
    assert f"diverged in step {metrics.diverged_at}" in again
    assert "--learning-rate" in again


def test_two_diverged_runs_can_be_compared(tiny_folder, text_file, tmp_path):
    options = ("--length", 16, "--steps", 6, "--eval-sequences", 1, "--learning-rate", 1e30, "--text", text_file)
    refused("finetune", tiny_folder, *options, "--output", tmp_path / "none", "--scaling", "none")
    said = refused("finetune", tiny_folder, *options, "--output", tmp_path / "fp8", "--baseline", tmp_path / "none")
    assert "diverged" in said
    assert (tmp_path / "fp8" / "metrics.json").exists()
    gap = loss_gap(RunMetrics.read(tmp_path / "fp8"), RunMetrics.read(tmp_path / "none"))
    assert set(gap) == {"largest |gap| of a step", "mean gap", "mean gap, last quarter"}
    assert all(map(math.isfinite, gap.values()))


def test_an_unexpected_error_keeps_its_traceback_and_the_steps(command, tmp_path, monkeypatch):
    steps, original = [], Trainer.training_step

    def training_step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("a bug of ours")
        return original(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    result = run(*command, "--output", tmp_path)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "a bug of ours" in result.stderr
    assert f"The run ended after step 2 of 4. Metrics of 2 steps are in {tmp_path}" in result.stdout
    assert has_results(tmp_path, 2).outcome == "failed"


class TestWithoutMatplotlib:
    @pytest.fixture(autouse=True)
    def missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)

    def test_finetune_trains_and_says_it(self, command, finished, tmp_path):
        result = run(*command, "--output", tmp_path)
        assert result.exit_code == 0, result.output
        assert sum("matplotlib" in line for line in result.stdout.splitlines()) == 1
        assert "pip install matplotlib" in result.stdout
        assert RunMetrics.read(tmp_path).losses == RunMetrics.read(finished).losses
        assert (tmp_path / "model").is_dir()
        assert not (tmp_path / "loss.png").exists()
        assert "loss.png" not in (tmp_path / "README.md").read_text()

    def test_transients_run_and_say_it(self, tiny_folder, text_file, tmp_path):
        options = ("--text", text_file, "--output", tmp_path, "--length", 16, "--scenario", "fresh", "--steps", 9)
        result = run("transients", tiny_folder, *options)
        assert result.exit_code == 0, result.output
        assert "pip install matplotlib" in result.stdout
        assert "| geometry |" in (tmp_path / "transients.md").read_text()
        assert (tmp_path / "transients.jsonl").exists()
        assert not (tmp_path / "transients.png").exists()


class TestBaseline:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("{", "cannot be read"),
            ("[]", "missing ['environment'"),
            ('{"loss": 1}', "unknown ['loss']"),
        ],
    )
    def test_of_other_keys_is_named(self, command, tmp_path, content, expected):
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "metrics.json").write_text(content)
        said = refused(*command, "--output", tmp_path / "out", "--baseline", tmp_path / "base")
        assert f"{tmp_path}/base/metrics.json" in said
        assert expected in said
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("change", [{"steps": [{"step": 1}]}, {"steps": 3}, {"settings": {}}])
    def test_of_other_contents_is_named(self, finished, tmp_path, change):
        found = json.loads((finished / "metrics.json").read_text()) | change
        (tmp_path / "metrics.json").write_text(json.dumps(found))
        with pytest.raises(InputError, match="was not written by"):
            RunMetrics.read(tmp_path)

    def test_of_an_earlier_release_is_read(self, finished, tmp_path):
        found = json.loads((finished / "metrics.json").read_text())
        for name in ("outcome", "diverged_at"):
            del found[name]
        del found["settings"]["split"]
        (tmp_path / "metrics.json").write_text(json.dumps(found))
        settings = RunMetrics.read(finished).settings
        assert read_baseline(tmp_path, settings).outcome == "finished"


class TestCard:
    def card(self, finished, tmp_path, **changes) -> ModelCard:
        metrics = replace(RunMetrics.read(finished), **changes)
        write_results(metrics, None, tmp_path, False)
        return ModelCard.load(tmp_path / "README.md")

    def settings(self, finished, **changes) -> dict:
        return RunMetrics.read(finished).settings | changes

    def test_names_the_kernels_that_ran(self, finished, tmp_path):
        rows = RunMetrics.read(finished).layers
        text = self.card(finished, tmp_path, layers=[row | {"kernels": "Hopper kernels"} for row in rows]).text
        assert "by Hopper kernels" in text
        text = self.card(finished, tmp_path, layers=[row | {"kernels": "plain PyTorch"} for row in rows]).text
        assert "by plain PyTorch (the" in text
        assert "slower than SDPA" in text
        for row in rows:
            row.pop("kernels", None)
        assert "forward and backward. hf_geoscale" in self.card(finished, tmp_path, layers=rows).text

    def test_names_the_text(self, finished, tmp_path, text_file):
        assert f"- text: {text_file.name}\n" in self.card(finished, tmp_path).text
        text = self.card(finished, tmp_path, settings=self.settings(finished, text=None)).text
        assert "- text: the English manual that ships with Python" in text
        assert "None" not in text
        data = self.settings(finished, text=None, dataset="org/data", column="words")
        card = self.card(finished, tmp_path, settings=data)
        assert "- text: column 'words' of the split 'train' of org/data" in card.text
        assert card.data.datasets == ["org/data"]

    def test_the_paper_is_linked_as_the_paper(self, finished, tmp_path):
        text = self.card(finished, tmp_path).text
        assert "[paper](https://arxiv.org/abs/2602.18851)" in text
        assert "[hf_geoscale]" not in text

    def test_a_hub_model_is_the_base_with_its_license(self, finished, tmp_path, monkeypatch):
        told = SimpleNamespace(to_dict=lambda: {"license": "apache-2.0", "base_model": "org/older", "tags": ["x"]})
        monkeypatch.setattr(cards.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(card_data=told))
        card = self.card(finished, tmp_path, settings=self.settings(finished, model="org/model"))
        assert (card.data.base_model, card.data.license) == ("org/model", "apache-2.0")

    def test_an_unreachable_hub_leaves_the_license_out(self, finished, tmp_path, monkeypatch):
        def fail(*_, **__):
            raise ConnectionError

        monkeypatch.setattr(cards.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(HfApi, "model_info", fail)
        card = self.card(finished, tmp_path, settings=self.settings(finished, model="org/model"))
        assert card.data.base_model == "org/model"
        assert card.data.license is None

    def test_a_folder_tells_by_its_own_card(self, finished, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        card = self.card(finished, tmp_path, settings=self.settings(finished, model=str(folder)))
        assert card.data.base_model is None
        (folder / "README.md").write_text("---\nlicense: mit\nbase_model:\n- org/base\n---\n# x\n")
        card = self.card(finished, tmp_path, settings=self.settings(finished, model=str(folder)))
        assert (card.data.base_model, card.data.license) == ("org/base", "mit")
        assert "- model: model\n" in card.text  # no path
        assert str(tmp_path) not in card.text

    def test_an_adapter_tells_its_base(self, finished, tmp_path):
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
        card = self.card(finished, tmp_path, settings=self.settings(finished, model=str(folder)))
        assert card.data.base_model == "org/base"


class TestPlot:
    @pytest.fixture
    def drawn(self, monkeypatch):
        pyplot = pytest.importorskip("matplotlib.pyplot")
        figures = []
        monkeypatch.setattr(pyplot, "close", figures.append)
        yield figures
        monkeypatch.undo()
        for figure in figures:
            pyplot.close(figure)

    def draw(self, drawn, metrics, baseline, path):
        write_results(metrics, baseline, path, True)
        figure = drawn[-1]
        return figure.get_suptitle(), {axis.get_title(): axis for axis in figure.axes}

    def test_name_panels_and_ticks(self, finished, tmp_path, drawn, tiny_folder):
        metrics = RunMetrics.read(finished)
        title, panels = self.draw(drawn, metrics, None, tmp_path)
        assert title == tiny_folder.name
        assert list(panels) == ["Training loss", "Worst certificate utilisation"]
        title, panels = self.draw(drawn, metrics, metrics, tmp_path)
        assert list(panels) == ["Training loss", "Loss difference", "Worst certificate utilisation"]
        assert list(panels["Loss difference"].lines[-1].get_ydata()) == [0.0] * 4
        drawn[-1].canvas.draw()
        for axis in panels.values():
            assert all(float(tick).is_integer() for tick in axis.get_xticks())

    def test_a_baseline_has_no_utilisation(self, finished, tmp_path, drawn):
        metrics = RunMetrics.read(finished)
        plain = replace(metrics, settings=metrics.settings | {"scaling": "none"}, layers=None)
        assert list(self.draw(drawn, plain, None, tmp_path)[1]) == ["Training loss"]

    @pytest.mark.parametrize("done", [0, 1, 2])
    def test_of_unfinished_runs(self, finished, tmp_path, drawn, done):
        metrics = RunMetrics.read(finished)
        part = replace(metrics, steps=metrics.steps[:done], outcome="diverged", diverged_at=done + 1, eval_after=None)
        title, panels = self.draw(drawn, part, metrics, tmp_path)
        assert f"diverged in step {done + 1}" in title
        assert len(panels["Loss difference"].lines[1].get_xdata()) == done


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_whole(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_out_of_memory_is_one_line(command, tmp_path, monkeypatch):
    original = Trainer.training_step

    def training_step(*args, **kwargs):
        torch.empty(2**50, device="cuda")
        return original(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    assert "out of memory" in refused(*command, "--output", tmp_path)

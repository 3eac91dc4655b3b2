"""Metrics reach every reporter although reporters run first, and those of evaluations stay apart from those of training."""

import json
from collections import Counter

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from hf_geoscale import FragilityCallback, GeoScaleCallback, QKClip, geometry_report, patch_model
from hf_geoscale.geometry import operand_bound
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.reporting import ReportingCallback, evaluation_prefix
from hf_geoscale.scaling import E4M3, GeometryScaling

from ..conftest import here, tiny_model, tokens
from ..tolerances import FLIPPED_ROUNDINGS
from .test_callback import METRICS, trainer

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class Reporter(TrainerCallback):
    """What TensorBoard's, W&B's and the others' callbacks are: logs come in, and leave the process at once."""

    def __init__(self):
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))

    def losses(self) -> list[dict]:
        return [logs for logs in self.seen if "loss" in logs]


class Counting(TrainerCallback):
    """Counts its events by name."""

    def __init__(self):
        self.events: Counter[str] = Counter()


for _event in EVENTS:
    setattr(Counting, _event, lambda self, *_, event=_event, **__: self.events.update([event]))


def trainer_with_reporter(folder, *callbacks, model=None, **options):
    """A trainer whose reporter is there before the callbacks, as those of `report_to` are."""
    reporter = Reporter()
    return trainer(model or tiny_model("llama"), folder, reporter, *callbacks, **options), reporter


class TestReporters:
    @pytest.mark.parametrize("way", ["instance", "class", "added", "attached", "attached twice"])
    def test_get_the_metrics(self, tmp_path, way):
        given = {"instance": [GeoScaleCallback()], "class": [GeoScaleCallback]}.get(way, [])
        run, reporter = trainer_with_reporter(tmp_path, *given, steps=2)
        if way == "added":
            run.add_callback(GeoScaleCallback())
        elif way.startswith("attached"):
            callback = GeoScaleCallback()
            assert callback.attach(run) is callback
            if way == "attached twice":
                callback.attach(run)
        run.train()
        assert len(reporter.losses()) == 2
        for logs in reporter.losses():
            assert logs.keys() >= METRICS
        assert len([c for c in run.callback_handler.callbacks if isinstance(c, GeoScaleCallback)]) == 1
        assert [row["calls"] for row in geometry_report(run.model).rows] == [2, 2]

    def test_the_history_has_them_too_and_is_written_to_checkpoints(self, tmp_path):
        run, reporter = trainer_with_reporter(
            tmp_path, GeoScaleCallback(), steps=2, save_strategy="steps", save_steps=2
        )
        run.train()
        written = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
        for mine, theirs in zip(written, reporter.losses(), strict=True):
            assert {k: v for k, v in mine.items() if "geoscale" in k} == {
                k: v for k, v in theirs.items() if "geoscale" in k
            }

    def test_a_real_tensorboard_writer(self, tmp_path, monkeypatch):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
        run = trainer(tiny_model("llama"), tmp_path, report_to=["tensorboard"], eval_strategy="steps", eval_steps=2)
        run.add_callback(GeoScaleCallback())
        run.train()
        written = next(tmp_path.rglob("events.out.tfevents.*"))  # older releases have a folder of their own choice
        board = EventAccumulator(str(written.parent))
        board.Reload()
        scalars = set(board.Tags()["scalars"])
        assert scalars >= {f"train/{name}" for name in METRICS}
        assert scalars >= {"eval/geoscale/utilisation", "eval/geoscale/overflows"}
        assert len(board.Scalars("train/geoscale/utilisation")) == 4
        assert len(board.Scalars("eval/geoscale/utilisation")) == 2
        assert any(tag.startswith("train/geoscale/kernels") for tag in board.Tags()["tensors"])

    def test_other_callbacks_of_ours(self, tmp_path):
        model = patch_model(tiny_model("llama"), observe_logits=True)
        callbacks = QKClip(model), GeoScaleCallback(), FragilityCallback(every_n_steps=1)
        run, reporter = trainer_with_reporter(tmp_path, *callbacks, model=model, steps=2)
        run.train()
        ours = [c for c in run.callback_handler.callbacks if isinstance(c, ReportingCallback)]
        assert ours == list(callbacks) == run.callback_handler.callbacks[:3]  # in their order
        for logs in reporter.losses():
            assert logs.keys() >= METRICS | {"qk_clip/clipped_heads", "fragility/predicted"}

    def test_a_callback_that_no_trainer_calls_says_the_line_to_add_once(self, caplog):
        model, callback = tiny_model("llama"), GeoScaleCallback()
        handler = CallbackHandler([Reporter(), callback], model, None, None, None)
        state = TrainerState()
        handler.on_init_end(None, state, TrainerControl())
        for _ in range(2):
            handler.on_log(None, state, TrainerControl(), logs={"loss": 1.0})
        assert caplog.text.count("GeoScaleCallback().attach(trainer)") == 1


class TestMoving:
    """`ReportingCallback` moves while the handler loops over the list it moves in."""

    @pytest.mark.parametrize("place", range(5))
    def test_no_event_is_skipped_or_repeated(self, tmp_path, place):
        callback, others = GeoScaleCallback(), [Counting() for _ in range(4)]
        mine: Counter[str] = Counter()
        for event in EVENTS:
            method = getattr(callback, event)
            setattr(callback, event, lambda *x, m=method, e=event, **y: (mine.update([e]), m(*x, **y))[1])
        run = trainer(
            tiny_model("llama"),
            tmp_path,
            *others[:place],
            callback,
            *others[place:],
            eval_strategy="steps",
            eval_steps=2,
        )
        run.train()
        assert run.callback_handler.callbacks[0] is callback
        assert [c for c in run.callback_handler.callbacks if isinstance(c, Counting)] == others
        assert mine["on_init_end"] == mine["on_train_begin"] == 1
        for other in others:
            assert other.events == mine

    def test_a_callback_added_in_the_middle_of_training(self, tmp_path):
        class Adds(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    run.add_callback(GeoScaleCallback())

        model = patch_model(tiny_model("llama"))
        run, reporter = trainer_with_reporter(tmp_path, Adds(), model=model)
        run.train()
        assert [logs.keys() >= METRICS for logs in reporter.losses()] == [False, True, True, True]

    def test_writes_of_callbacks_after_a_step_are_measured(self, tmp_path, monkeypatch):
        """Through `.data`, which no version counts, by callbacks in front of ours and behind it."""

        class Writes(TrainerCallback):
            def on_optimizer_step(self, args, state, control, model=None, **kwargs):
                for block in model.model.layers:
                    block.self_attn.q_proj.weight.data.mul_(1.5)

        class AlsoWrites(Writes):
            pass

        model = patch_model(tiny_model("llama").train())
        original, stale = GeometryScaling.quant_scales, []

        def spy(scaling, *operands):
            scales = original(scaling, *operands)
            layer = next(layer for layer in geoscale_layers(model) if layer.scaling is scaling)
            bound = operand_bound(layer.site.projections()[0])
            stale.append(not torch.equal(scales.q, (E4M3.max / bound).float()))
            return scales

        monkeypatch.setattr(GeometryScaling, "quant_scales", spy)
        trainer(model, tmp_path, Writes(), GeoScaleCallback(), AlsoWrites()).train()
        assert stale == [False] * 8


class TestEvaluation:
    def logs(self, folder, scale, **options):
        """Logs of a run whose evaluation data make larger queries: entries of the embedding that only they reach are scaled."""
        model = tiny_model("llama")
        run, reporter = trainer_with_reporter(folder, GeoScaleCallback(), model=model, learning_rate=0.0, **options)
        rows = tokens(4, 24, seed=5)
        run.eval_dataset = [{"input_ids": row.clamp(max=scale), "labels": row.clamp(max=scale)} for row in rows]
        run.train()
        return reporter, run

    def test_is_apart_from_training(self, tmp_path):
        """Evaluation between two logs: training logs are those of a run without it, evaluation logs those of its data."""
        plain, _ = self.logs(tmp_path / "a", 95, logging_steps=2)
        mixed, run = self.logs(
            tmp_path / "b", 3, logging_steps=2, eval_strategy="steps", eval_steps=1
        )  # one token alone
        for mine, theirs in zip(mixed.losses(), plain.losses(), strict=True):
            assert mine["geoscale/utilisation"] == theirs["geoscale/utilisation"]
            assert mine["geoscale/utilisation_layer"] == theirs["geoscale/utilisation_layer"]
        evaluations = [logs for logs in mixed.seen if "eval_loss" in logs]
        assert len(evaluations) == 4
        assert not any(name.startswith("geoscale/") for logs in evaluations for name in logs)
        model = patch_model(tiny_model("llama"))
        model(torch.stack([row["input_ids"] for row in run.eval_dataset]))
        alone = max(row["utilisation"] for row in geometry_report(model).rows)
        for logs in evaluations:
            # On a GPU a batch of another size sums its products in another order, and q is rounded to BF16.
            rounding = FLIPPED_ROUNDINGS if here().type == "cuda" else 1e-6
            assert logs["eval_geoscale/utilisation"] == pytest.approx(alone, rel=rounding)
            assert logs["eval_geoscale/utilisation"] != mixed.losses()[0]["geoscale/utilisation"]

    def test_counts_its_own_overflows(self, tmp_path, monkeypatch):
        """Scales too large in evaluation alone, and then in training alone."""
        for spoilt_in_training in (False, True):
            model = tiny_model("llama")
            original = GeometryScaling.quant_scales

            def spoil(scaling, *operands, model=model, when=spoilt_in_training, original=original):
                scales = original(scaling, *operands)
                return type(scales)(scales.q * 100, scales.k, scales.v) if model.training is when else scales

            monkeypatch.setattr(GeometryScaling, "quant_scales", spoil)
            run, reporter = trainer_with_reporter(
                tmp_path, GeoScaleCallback(), model=model, eval_strategy="steps", eval_steps=1
            )
            run.train()
            monkeypatch.setattr(GeometryScaling, "quant_scales", original)
            training = [logs["geoscale/overflows"] for logs in reporter.losses()]
            evaluation = [logs["eval_geoscale/overflows"] for logs in reporter.seen if "eval_loss" in logs]
            spoilt, clean = (training, evaluation) if spoilt_in_training else (evaluation, training)
            assert clean == [0] * 4
            assert sorted(set(spoilt)) == spoilt  # grows with each
            assert spoilt[0] > 0
            total = sum(row["overflows"] for row in geometry_report(model).rows)
            assert total == spoilt[-1]

    def test_without_training(self, tmp_path):
        run, reporter = trainer_with_reporter(tmp_path, GeoScaleCallback())
        metrics = run.evaluate()
        assert metrics["eval_geoscale/overflows"] == 0
        assert 0 < metrics["eval_geoscale/utilisation"] < 1
        assert reporter.seen[0]["eval_geoscale/utilisation"] == metrics["eval_geoscale/utilisation"]

    def test_names_of_the_caller(self, tmp_path):
        run, reporter = trainer_with_reporter(tmp_path, GeoScaleCallback())
        run.evaluate(metric_key_prefix="valid")
        assert "valid_geoscale/utilisation" in reporter.seen[-1]
        run.evaluate(eval_dataset={"a": run.eval_dataset, "b": run.eval_dataset})
        assert "eval_a_geoscale/utilisation" in reporter.seen[-2]
        assert "eval_b_geoscale/utilisation" in reporter.seen[-1]

    def test_predict(self, tmp_path):
        run, reporter = trainer_with_reporter(tmp_path, GeoScaleCallback())
        metrics = run.predict(run.eval_dataset).metrics
        assert 0 < metrics["test_geoscale/utilisation"] < 1
        assert reporter.seen == []

    def test_modules_trained_in_evaluation_mode(self, tmp_path):
        """As frozen parts may be: there is no call in training mode, so none is told apart."""

        model = tiny_model("llama")
        model.train = lambda mode=True: model
        run, reporter = trainer_with_reporter(tmp_path, GeoScaleCallback(), model=model)
        run.train()
        assert all(0 < logs["geoscale/utilisation"] < 1 for logs in reporter.losses())

    @pytest.mark.parametrize(
        ("names", "prefix"),
        [
            ({"loss", "epoch"}, None),
            ({"train_loss", "train_runtime"}, None),
            ({"eval_loss", "eval_runtime", "eval_x_runtime"}, "eval"),
            ({"mine_loss", "mine_runtime"}, "mine"),
        ],
    )
    def test_logs_of_evaluations_are_known_by_their_runtime(self, names, prefix):
        assert evaluation_prefix(dict.fromkeys(names, 1.0)) == prefix


class TestKernels:
    def test_are_in_the_first_and_the_last_log(self, tmp_path):
        run, reporter = trainer_with_reporter(tmp_path, GeoScaleCallback(), steps=3)
        result = run.train()
        (ran,) = {row["kernels"] for row in geometry_report(run.model).rows}
        assert [logs.get("geoscale/kernels") for logs in reporter.seen] == [ran, None, None, ran]
        assert result.metrics["geoscale/kernels"] == ran
        assert run.train().metrics["geoscale/kernels"] == ran
        assert [logs.get("geoscale/kernels") for logs in reporter.seen[4:]] == [ran, None, None, ran]

"""Which model the callback patches, when and with what: models made later, callbacks added later, several trainers."""

import logging

import pytest
import torch
from transformers import Trainer

from hf_geoscale import GeoScaleCallback, GeoScaleConfig, UnsupportedModelError, geometry_report, patch_model
from hf_geoscale.integrations import callback as module
from hf_geoscale.integrations import geoscale_layers, patched_layers

from ..conftest import tiny_model
from .test_callback import METRICS, FreshAtEachForward, trainer


def made_later(folder, *callbacks, **options) -> Trainer:
    """A trainer that makes its model when training begins."""
    run = trainer(tiny_model("llama"), folder, **options)
    return Trainer(
        model_init=lambda trial: tiny_model("llama"),
        args=run.args,
        train_dataset=run.train_dataset,
        eval_dataset=run.eval_dataset,
        callbacks=list(callbacks),
    )


def check(run, steps=4, **fields):
    """FP8 in every step, scales fresh, metrics in the history."""
    layers = geoscale_layers(run.model)
    assert [layer.calls for layer in layers] == [steps] * 2
    assert all(getattr(layer.config, name) == value for layer in layers for name, value in fields.items())
    logs = [entry for entry in run.state.log_history if "loss" in entry][-steps:]
    assert len(logs) == steps
    assert all(entry.keys() >= METRICS for entry in logs)


class TestModelsMadeLater:
    def test_model_init(self, tmp_path):
        run = made_later(tmp_path, GeoScaleCallback())
        first = run.model
        run.train()
        assert run.model is not first
        check(run)

    def test_model_init_and_attach(self, tmp_path):
        run = made_later(tmp_path)
        GeoScaleCallback().attach(run)
        run.train()
        check(run)

    def test_model_init_and_add_callback(self, tmp_path):
        run = made_later(tmp_path)
        run.add_callback(GeoScaleCallback(precision="high"))
        run.train()
        check(run, precision="high")

    def test_model_init_that_patches(self, tmp_path, caplog):
        run = made_later(tmp_path, GeoScaleCallback())
        run.model_init = lambda: patch_model(tiny_model("llama"), precision="high")
        run.train()
        check(run, precision="high")
        assert "was patched before" not in caplog.text

    def test_every_run(self, tmp_path):
        run = made_later(tmp_path, GeoScaleCallback())
        models = []
        for _ in range(3):
            run.train()
            models.append(run.model)
            check(run)
        assert len({id(model) for model in models}) == 3

    def test_hyperparameter_search(self, tmp_path, monkeypatch):
        """The default objective is the loss of the evaluation, to which our metrics must not be added."""
        pytest.importorskip("optuna")
        callback = GeoScaleCallback()
        run = made_later(tmp_path, callback, eval_strategy="steps", eval_steps=2)
        seen = []
        original = Trainer.evaluate
        monkeypatch.setattr(Trainer, "evaluate", lambda self, *x, **y: seen.append(m := original(self, *x, **y)) or m)
        space = lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)}  # noqa: E731
        best = run.hyperparameter_search(hp_space=space, n_trials=2, direction="minimize", backend="optuna")
        assert best.objective in [metrics["eval_loss"] for metrics in seen]
        check(run)


class TestCallbacksAddedLater:
    @pytest.mark.parametrize("patched_before", [False, True])
    def test_add_callback(self, tmp_path, monkeypatch, patched_before):
        model = tiny_model("llama")
        if patched_before:
            patch_model(model)
        run = trainer(model, tmp_path)
        run.add_callback(GeoScaleCallback())
        assert bool(patched_layers(model)) == patched_before
        fresh = []
        patch = module.patch_model

        def then_watch(model, *arguments):
            patch(model, *arguments)
            fresh.append(FreshAtEachForward(model, monkeypatch))

        monkeypatch.setattr(module, "patch_model", then_watch)
        run.train()
        check(run)
        if not patched_before:
            assert [(seen.seen, seen.stale) for seen in fresh] == [(8, 0)]

    def test_attached_after_a_run(self, tmp_path):
        run = trainer(tiny_model("llama"), tmp_path)
        run.train()
        GeoScaleCallback().attach(run)
        run.train()
        check(run)

    def test_in_the_middle_of_a_run(self, tmp_path):
        from transformers import TrainerCallback

        class Adds(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    run.add_callback(GeoScaleCallback())

        run = trainer(tiny_model("llama"), tmp_path, Adds())
        run.train()
        assert [layer.calls for layer in geoscale_layers(run.model)] == [2, 2]
        assert "geoscale/utilisation" in run.state.log_history[2]

    def test_an_evaluation_before_training_says_that_it_runs_without_fp8(self, tmp_path, caplog):
        run = trainer(tiny_model("llama"), tmp_path)
        callback = GeoScaleCallback()
        run.add_callback(callback)
        run.evaluate()
        run.evaluate()
        assert patched_layers(run.model) == []
        assert caplog.text.count("this evaluation runs without FP8") == 1
        callback.attach(run)
        assert "eval_geoscale/utilisation" in run.evaluate()

    def test_compiled(self, tmp_path):
        run = trainer(tiny_model("llama"), tmp_path, torch_compile=True, torch_compile_backend="eager", tf32=False)
        run.add_callback(GeoScaleCallback())
        run.train()
        check(run)

    @pytest.mark.parametrize("with_model_init", [False, True])
    def test_zero3_is_refused_with_the_line_to_add(self, tmp_path, monkeypatch, with_model_init):
        """Parameters as DeepSpeed leaves them when it has prepared a model; the real thing is in tests/distributed."""
        monkeypatch.setattr(module, "is_partitioned", lambda parameter: True)
        line = "GeoScaleCallback().attach(trainer)"
        if with_model_init:
            run, line = made_later(tmp_path), "return patch_model(model) at the end of model_init"
        else:
            run = trainer(tiny_model("llama"), tmp_path)
        run.add_callback(GeoScaleCallback())
        with pytest.raises(UnsupportedModelError, match="comes too late") as refused:
            run.train()
        assert line in str(refused.value)
        assert patched_layers(run.model) == []


def test_one_callback_in_two_trainers(tmp_path):
    callback = GeoScaleCallback()
    runs = [trainer(tiny_model("llama", seed=seed), tmp_path, callback) for seed in (0, 1)]
    for run in (*runs, runs[0]):
        run.train()
    assert [layer.calls for run in runs for layer in geoscale_layers(run.model)] == [8, 8, 4, 4]
    first = runs[1].evaluate()["eval_geoscale/utilisation"]
    alone = patch_model(tiny_model("llama", seed=1))
    alone.load_state_dict(runs[1].model.state_dict())
    again = trainer(alone, tmp_path, GeoScaleCallback()).evaluate()["eval_geoscale/utilisation"]
    assert first == again  # of the model of that trainer, not of the one that trained last
    assert callback.layers == []  # and no model is kept


class TestConfiguration:
    def test_takes_what_patch_model_takes(self, tmp_path):
        model = tiny_model("llama")
        trainer(model, tmp_path, GeoScaleCallback(precision="high", incoherent=False), steps=1).train()
        assert geoscale_layers(model)[0].config == GeoScaleConfig(precision="high", incoherent=False)
        callback = GeoScaleCallback(2, GeoScaleConfig(headroom=2.0), backend="reference")
        assert callback.config == GeoScaleConfig(headroom=2.0, backend="reference")

    def test_misuse_is_named(self):
        with pytest.raises(TypeError, match=r'every_n_steps must be an int, got GeoScaleConfig.*precision="high"'):
            GeoScaleCallback(GeoScaleConfig())
        with pytest.raises(TypeError, match="every_n_steps must be an int, got 'high'"):
            GeoScaleCallback("high")
        with pytest.raises(TypeError, match="precison"):
            GeoScaleCallback(precison="high")
        with pytest.raises(ValueError, match="precision must be one of"):
            GeoScaleCallback(precision="fp8")

    def test_repr_makes_it_again(self):
        for callback in (
            GeoScaleCallback(),
            GeoScaleCallback(3),
            GeoScaleCallback(precision="high", backend="reference"),
            GeoScaleCallback(2, GeoScaleConfig(headroom=8.0, fallback="sdpa")),
        ):
            again = eval(repr(callback))
            assert (again.every_n_steps, again.config) == (callback.every_n_steps, callback.config)
        assert repr(GeoScaleCallback()) == "GeoScaleCallback(every_n_steps=1)"
        assert repr(GeoScaleCallback(3)) == "GeoScaleCallback(every_n_steps=3, headroom=4.0)"

    def test_a_difference_from_the_models_own_configuration_is_said_once(self, tmp_path, caplog):
        model = patch_model(tiny_model("llama"), precision="standard", headroom=2.0)
        callback = GeoScaleCallback(precision="high", headroom=2.0)
        with caplog.at_level(logging.WARNING):
            run = trainer(model, tmp_path, callback, steps=1)
            run.train()
            run.train()
        (line,) = [r.getMessage() for r in caplog.records if "was patched before" in r.getMessage()]
        assert line == (
            "geoscale: the model was patched before with precision='standard', which holds. GeoScaleCallback's precision='high' "
            "does not: give one of the two"
        )
        assert geoscale_layers(model)[0].config.precision == "standard"

    def test_a_whole_configuration_is_compared_whole(self, tmp_path, caplog):
        model = patch_model(tiny_model("llama"), incoherent=False)
        trainer(model, tmp_path, GeoScaleCallback(config=GeoScaleConfig()))
        assert "patched before with incoherent=False, which holds" in caplog.text

    @pytest.mark.parametrize("callback", [GeoScaleCallback(), GeoScaleCallback(precision="high")])
    def test_no_difference_is_no_warning(self, tmp_path, caplog, callback):
        model = patch_model(tiny_model("llama"), precision="high")
        trainer(model, tmp_path, callback, steps=1).train()
        assert "was patched before" not in caplog.text

    def test_a_headroom_that_leaves_no_room_is_said(self, tmp_path, caplog):
        model = patch_model(tiny_model("llama"))
        trainer(model, tmp_path, GeoScaleCallback(every_n_steps=5), steps=1).train()
        assert caplog.text.count("refreshed every step and not every 5; patch_model(model, headroom=4)") == 1


def test_a_checkpoint_resumed_with_add_callback(tmp_path):
    run = trainer(tiny_model("llama"), tmp_path, GeoScaleCallback(), save_strategy="steps", save_steps=2)
    run.train()
    weights = {name: p.clone() for name, p in run.model.named_parameters()}
    again = trainer(tiny_model("llama", seed=3), tmp_path, save_strategy="steps", save_steps=2)
    again.add_callback(GeoScaleCallback())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, weights[name]) for name, p in again.model.named_parameters())
    assert [row["calls"] for row in geometry_report(again.model).rows] == [2, 2]

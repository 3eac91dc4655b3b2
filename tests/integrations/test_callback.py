"""The callback inside a real Trainer: when it refreshes, what it logs, what it notices."""

import logging
from dataclasses import replace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_geoscale import GeoScaleCallback, GeoScaleConfig, geometry_report, patch_model
from hf_geoscale.geometry import operand_bound
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.callback import SCHEDULED_HEADROOM, adam_step_bound
from hf_geoscale.scaling import E4M3, GeometryScaling

from ..conftest import tiny_model, tokens

METRICS = {"geoscale/utilisation", "geoscale/overflows", "geoscale/sigma_drift", "geoscale/refresh_seconds"}


def trainer(model, folder, *callbacks, steps=4, **arguments) -> Trainer:
    rows = tokens(16, 24)
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": not rows.is_cuda,
        "dataloader_pin_memory": False,  # the data are where the model is
        "learning_rate": 1e-3,
    } | arguments
    args = TrainingArguments(**arguments)
    return Trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:2], callbacks=list(callbacks))


@pytest.fixture
def refreshes(monkeypatch):
    """Global steps at which the callback refreshed, oldest first."""
    steps = []
    original = GeoScaleCallback._refresh

    def spy(self, model):
        steps.append(sum(layer.calls for layer in geoscale_layers(model)))
        original(self, model)

    monkeypatch.setattr(GeoScaleCallback, "_refresh", spy)
    return steps


class FreshAtEachForward:
    """Looks, at each FP8 call, whether the scales in use are those of the weights in use, measured anew."""

    def __init__(self, model, monkeypatch):
        self.seen, self.stale = 0, 0
        original = GeometryScaling.quant_scales
        layers = {id(layer.scaling): layer for layer in geoscale_layers(model)}

        def spy(scaling, *operands):
            scales = original(scaling, *operands)
            bound = operand_bound(layers[id(scaling)].site.projections()[0])
            self.seen += 1
            self.stale += not torch.equal(scales.q, (E4M3.max / scaling.headroom / bound).float())
            return scales

        monkeypatch.setattr(GeometryScaling, "quant_scales", spy)


def test_callback_alone_patches_refreshes_and_logs(tmp_path, refreshes, monkeypatch):
    model = tiny_model("llama")
    run = trainer(model, tmp_path, GeoScaleCallback())
    fresh = FreshAtEachForward(model, monkeypatch)
    run.train()
    assert refreshes == [0, 2, 4, 6, 8, 8]  # before, after each of 4 steps of 2 layers, at the end
    assert (fresh.seen, fresh.stale) == (8, 0)
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 4
    for entry in logs:
        assert entry.keys() >= METRICS
        assert entry["geoscale/overflows"] == 0
        assert 0 < entry["geoscale/utilisation"] < 1
        assert entry["geoscale/refresh_seconds"] > 0
    assert logs[-1]["geoscale/sigma_drift"] > 0


@pytest.mark.parametrize("callbacks", [(GeoScaleCallback(),), ()], ids=["callback", "patched only"])
def test_training_and_evaluation_always_see_fresh_scales(tmp_path, monkeypatch, callbacks):
    model = patch_model(tiny_model("llama"))
    run = trainer(model, tmp_path, *callbacks, eval_strategy="steps", eval_steps=1)
    fresh = FreshAtEachForward(model, monkeypatch)
    run.train()
    assert fresh.seen > 8
    assert fresh.stale == 0


def test_the_freshness_check_sees_stale_scales(tmp_path, monkeypatch):
    model = patch_model(tiny_model("llama"))
    run = trainer(model, tmp_path)
    fresh = FreshAtEachForward(model, monkeypatch)
    monkeypatch.setattr("hf_geoscale.integrations.layer.GeoScaleLayer.refresh_if_stale", lambda self: None)
    run.train()
    assert fresh.stale == 6  # all but the first step's


def test_an_interrupted_run_leaves_nothing_stale(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, GeoScaleCallback(every_n_steps=10), Stop(), learning_rate=1e-6).train()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(100)
    model(tokens(1, 20))
    assert sum(row["overflows"] for row in geometry_report(model).rows) == 0


def test_another_callbacks_write_is_noticed_between_scheduled_refreshes(tmp_path):
    class Write(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.model.layers[0].self_attn.v_proj.weight.mul_(100)

    model = tiny_model("llama")
    trainer(model, tmp_path, GeoScaleCallback(every_n_steps=10), Write(), learning_rate=1e-6).train()
    assert sum(row["overflows"] for row in geometry_report(model).rows) == 0


def test_an_overflow_is_a_warning(tmp_path, caplog, monkeypatch):
    original = GeometryScaling.quant_scales
    monkeypatch.setattr(
        GeometryScaling, "quant_scales", lambda self, *x: (s := original(self, *x)) and replace(s, q=s.q * 100)
    )
    with caplog.at_level(logging.WARNING):
        trainer(tiny_model("llama"), tmp_path, GeoScaleCallback(), steps=1).train()
    assert "FP8 overflows so far" in caplog.text


@pytest.mark.feature("Gradient accumulation")
def test_gradient_accumulation_refreshes_once_a_step(tmp_path, refreshes):
    model = patch_model(tiny_model("llama"))
    trainer(model, tmp_path, GeoScaleCallback(), steps=2, gradient_accumulation_steps=3).train()
    assert refreshes == [0, 6, 12, 12]


def test_every_n_steps(tmp_path, refreshes):
    model = tiny_model("llama")
    run = trainer(model, tmp_path, GeoScaleCallback(every_n_steps=3), steps=7, learning_rate=1e-6)
    run.train()
    assert refreshes == [0, 6, 12, 14]
    assert geoscale_layers(model)[0].config.headroom == SCHEDULED_HEADROOM
    assert sum(row["overflows"] for row in geometry_report(model).rows) == 0


def test_drift_that_could_use_up_the_headroom_refreshes_early(tmp_path, refreshes):
    model = tiny_model("llama")
    trainer(model, tmp_path, GeoScaleCallback(every_n_steps=100), steps=3, learning_rate=0.5, warmup_steps=0).train()
    assert refreshes == [0, 2, 4, 6, 6]
    assert sum(row["overflows"] for row in geometry_report(model).rows) == 0


def test_an_optimizer_without_a_step_bound_refreshes_every_step(tmp_path, refreshes):
    model = tiny_model("llama")
    trainer(model, tmp_path, GeoScaleCallback(every_n_steps=100), steps=3, optim="sgd", learning_rate=1e-9).train()
    assert refreshes == [0, 2, 4, 6, 6]


def test_a_learning_rate_spike_overflows_nothing(tmp_path):
    model = tiny_model("llama")
    run = trainer(model, tmp_path, GeoScaleCallback(), steps=6, learning_rate=0.3, max_grad_norm=0.0, warmup_steps=0)
    before = max(geometry_report(model).rows[0]["q_bound"])
    run.train()
    rows = geometry_report(model).rows
    assert max(rows[0]["q_bound"]) > 3 * before  # the weights did move
    assert [row["overflows"] for row in rows] == [0, 0]


@pytest.mark.feature("Resume from a checkpoint")
def test_resume_refreshes_after_the_checkpoint_was_loaded(tmp_path, monkeypatch):
    model = tiny_model("llama")
    run = trainer(model, tmp_path, GeoScaleCallback(), save_strategy="steps", save_steps=2)
    run.train()
    finished = {n: p.clone() for n, p in model.named_parameters()}
    fresh = tiny_model("llama", seed=7)  # other weights, and scales of theirs
    again = trainer(fresh, tmp_path, GeoScaleCallback(), save_strategy="steps", save_steps=2)
    check = FreshAtEachForward(fresh, monkeypatch)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (check.seen, check.stale) == (4, 0)
    assert all(torch.equal(p, finished[n]) for n, p in fresh.named_parameters())
    assert [e["loss"] for e in again.state.log_history if "loss" in e] == [
        e["loss"] for e in run.state.log_history if "loss" in e
    ]


@pytest.mark.feature("load_best_model_at_end")
def test_best_model_at_the_end_is_refreshed(tmp_path):
    model = patch_model(tiny_model("llama"))
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(
        model,
        tmp_path,
        GeoScaleCallback(),
        **options,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls, so the "best" is not the last
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("-1")
    for layer in geoscale_layers(model):
        torch.testing.assert_close(
            layer.geometry.q_bound, operand_bound(layer.site.projections()[0]), rtol=1e-12, atol=0
        )


def test_attach_comes_before_reporters(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    run = trainer(tiny_model("llama"), tmp_path, Reporter(), steps=1)
    GeoScaleCallback().attach(run)
    run.train()
    assert seen[0].keys() >= METRICS


def test_a_patch_that_never_runs_is_a_warning(tmp_path, caplog):
    model = patch_model(tiny_model("llama"))
    for block in model.model.layers:  # what some libraries do
        attention = block.self_attn
        attention.forward = lambda hidden_states, attention=attention, **kw: (attention.o_proj(hidden_states), None)
    geoscale_layers(model)[0].calls = 5  # an evaluation before that
    with caplog.at_level(logging.WARNING):
        trainer(model, tmp_path, GeoScaleCallback(), steps=1).train()
    assert "layers [0, 1] are patched but their attention never ran" in caplog.text


def test_interval_must_be_positive():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        GeoScaleCallback(every_n_steps=0)


class TestAdamStepBound:
    @pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
    @pytest.mark.parametrize("gradients", ["spike", "growing", "noise", "constant"])
    def test_no_step_exceeds_it(self, optimizer, gradients):
        weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
        adam = optimizer([weight], lr=1e-2, weight_decay=0.0 if gradients == "growing" else 0.1)
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        for step in range(2500):
            weight.grad = {
                "spike": torch.full((4,), 1e-12 if step != 2000 else 1e3, dtype=torch.float64),
                "growing": torch.full((4,), 1.11**step, dtype=torch.float64),
                "noise": torch.randn(4, generator=generator, dtype=torch.float64),
                "constant": torch.ones(4, dtype=torch.float64),
            }[gradients]
            old = weight.detach().clone()
            bound = adam_step_bound(adam, float(old.abs().amax()), 0.0)
            adam.step()
            worst = max(worst, float((weight.detach() - old).abs().amax()) / bound)
        assert worst <= 1
        if gradients == "growing":
            assert worst > 0.9  # Kingma & Ba's constant, 3.2 against 7.3, would be exceeded

    def test_decoupled_decay_of_adam(self):
        weight = torch.nn.Parameter(torch.full((1,), 100.0))
        try:
            adam = torch.optim.Adam([weight], lr=0.01, weight_decay=1.0, decoupled_weight_decay=True)
        except TypeError:
            pytest.skip("this torch has no decoupled decay in Adam")
        bound = adam_step_bound(adam, 100.0, 0.0)
        weight.grad = torch.ones(1)
        adam.step()
        assert 1.0 < float(100 - weight.detach()) <= bound

    def test_other_optimizers_have_none(self):
        weight = torch.nn.Parameter(torch.ones(1))
        assert adam_step_bound(torch.optim.SGD([weight], lr=1.0), 1.0, 0.0) is None
        assert adam_step_bound(torch.optim.AdamW([weight], betas=(0.99, 0.9)), 1.0, 0.0) is None


def test_headroom_of_a_model_patched_before(tmp_path, refreshes):
    """headroom 1 leaves no room for drift: the callback refreshes every step although N is 5."""
    model = patch_model(tiny_model("llama"), GeoScaleConfig(headroom=1.0))
    trainer(model, tmp_path, GeoScaleCallback(every_n_steps=5), steps=3).train()
    assert refreshes == [0, 2, 4, 6, 6]

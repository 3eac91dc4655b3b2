"""The callback inside a real Trainer: when it refreshes, what it logs, what it notices."""

import logging

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_geoscale import GeoScaleCallback, GeoScaleConfig, geometry_report, patch_model
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.callback import SCHEDULED_HEADROOM, adam_step_bound

from ..conftest import tiny_model, tokens

METRICS = {"geoscale/utilisation", "geoscale/overflows", "geoscale/sigma_drift", "geoscale/refresh_seconds"}


def trainer(model, folder, *callbacks, steps=4, **arguments) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in tokens(16, 24)]
    arguments = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
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
    """A forward pre-hook that fails when scales are not of the weights in use."""

    def __init__(self, model):
        self.seen = 0
        for layer in geoscale_layers(model):
            layer.site.attention.register_forward_pre_hook(lambda *_, layer=layer: self.check(layer))

    def check(self, layer):
        assert layer.weights_version == layer.site.version()
        self.seen += 1


def test_callback_alone_patches_refreshes_and_logs(tmp_path, refreshes):
    model = tiny_model("llama")
    run = trainer(model, tmp_path, GeoScaleCallback())
    fresh = FreshAtEachForward(model)
    run.train()
    assert refreshes == [0, 2, 4, 6, 8, 8]  # before, after each of 4 steps of 2 layers, at the end
    assert fresh.seen == 8
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 4
    for entry in logs:
        assert entry.keys() >= METRICS
        assert entry["geoscale/overflows"] == 0
        assert 0 < entry["geoscale/utilisation"] < 1
        assert entry["geoscale/refresh_seconds"] > 0
    assert logs[-1]["geoscale/sigma_drift"] > 0


def test_evaluation_after_a_step_sees_fresh_scales(tmp_path):
    model = patch_model(tiny_model("llama"))
    run = trainer(model, tmp_path, GeoScaleCallback(), eval_strategy="steps", eval_steps=1)
    fresh = FreshAtEachForward(model)
    run.train()
    assert fresh.seen > 8


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
    assert not geoscale_layers(model)[0].scheduled
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


def test_resume_refreshes_after_the_checkpoint_was_loaded(tmp_path):
    model = tiny_model("llama")
    run = trainer(model, tmp_path, GeoScaleCallback(), save_strategy="steps", save_steps=2)
    run.train()
    finished = {n: p.clone() for n, p in model.named_parameters()}
    fresh = tiny_model("llama", seed=7)  # other weights, and scales of theirs
    again = trainer(fresh, tmp_path, GeoScaleCallback(), save_strategy="steps", save_steps=2)
    check = FreshAtEachForward(fresh)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert check.seen == 4
    assert all(torch.equal(p, finished[n]) for n, p in fresh.named_parameters())
    assert [e["loss"] for e in again.state.log_history if "loss" in e] == [
        e["loss"] for e in run.state.log_history if "loss" in e
    ]


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
        assert layer.weights_version == layer.site.version()


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

    def test_other_optimizers_have_none(self):
        weight = torch.nn.Parameter(torch.ones(1))
        assert adam_step_bound(torch.optim.SGD([weight], lr=1.0), 1.0, 0.0) is None
        assert adam_step_bound(torch.optim.AdamW([weight], betas=(0.99, 0.9)), 1.0, 0.0) is None


def test_headroom_of_a_model_patched_before(tmp_path, refreshes):
    """headroom 1 leaves no room for drift: the callback refreshes every step although N is 5."""
    model = patch_model(tiny_model("llama"), GeoScaleConfig(headroom=1.0))
    trainer(model, tmp_path, GeoScaleCallback(every_n_steps=5), steps=3).train()
    assert refreshes == [0, 2, 4, 6, 6]

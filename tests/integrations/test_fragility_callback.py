"""`FragilityCallback` in a Trainer: what it logs, when it probes, and that it disturbs nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_geoscale import EarlyWarning, FragilityCallback, NormEpsilonController, patch_model
from hf_geoscale.integrations.fragility import FragilityProbe

from ..conftest import tiny_model, tokens

STEPS = 6


def train(tmp_path, callback=None, family="llama", attach=False, patched=False, **options):
    """(losses by step, trainer)"""
    model = tiny_model(family)
    if patched:
        patch_model(model)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 24)]
    arguments = TrainingArguments(
        tmp_path,
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "disable_tqdm": True,
        }
        | options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[] if attach or callback is None else [callback])
    if attach:
        callback.attach(trainer)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], trainer


@pytest.mark.cpu
def test_it_logs_at_its_cadence_and_costs_what_it_says(tmp_path):
    callback = FragilityCallback(every_n_steps=3)
    _, trainer = train(tmp_path, callback)
    assert [step for step, _ in callback.history] == [1, 3, 6]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    reports = [callback.history[i][1] for i in (0, 0, 1, 1, 1, 2)]
    for log, report in zip(logs, reports, strict=True):
        assert log["fragility/predicted"] == report.predicted
        assert log["fragility/kappa_softmax"] == max(row["kappa_softmax"] for row in report.rows)
        assert log["fragility/worst_layer"] in (0, 1)
        assert "fragility/warnings" not in log
    assert [log["fragility/seconds"] > 0 for log in logs] == [True, False, True, False, False, True]
    total = sum(log["fragility/seconds"] for log in logs)
    assert total == pytest.approx(sum(callback.probe_seconds), abs=1e-5)
    assert len(callback.probe_seconds) == 3
    assert len({report.predicted for _, report in callback.history}) == 3  # the weights moved
    assert len({report.tokens for _, report in callback.history}) == 1


@pytest.mark.cpu
@pytest.mark.parametrize("patched", [False, True])
def test_training_is_bit_for_bit_what_it_is_without(tmp_path, patched):
    plain, without = train(tmp_path / "a", patched=patched)
    watched, trainer = train(tmp_path / "b", FragilityCallback(every_n_steps=2), patched=patched)
    assert watched == plain
    for one, other in zip(trainer.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any(m._forward_pre_hooks and m is trainer.model for m in trainer.model.modules())


@pytest.mark.cpu
def test_the_first_batch_is_kept_and_cut(tmp_path, monkeypatch):
    kept = []
    keep = FragilityCallback._keep
    monkeypatch.setattr(FragilityCallback, "_keep", lambda *args: kept.append(args[3]["input_ids"]) or keep(*args))
    callback = FragilityCallback(every_n_steps=2, sequences=1, max_length=10)
    train(tmp_path, callback)
    assert len(kept) == 1  # the hook is gone after the first forward
    assert torch.equal(callback.batch["input_ids"], kept[0][:1, :10])
    assert {report.tokens for _, report in callback.history} == {10}


@pytest.mark.cpu
def test_a_given_batch_is_probed_as_it_is(tmp_path):
    ids = tokens(1, 17, seed=5)
    callback = FragilityCallback(every_n_steps=STEPS, batch=ids, precision="float8_e4m3", v1=True)
    _, trainer = train(tmp_path, callback, "gpt2")
    step, report = callback.history[-1]
    assert step == STEPS
    again = FragilityProbe(trainer.model, "float8_e4m3").report(ids)
    assert report.predicted == pytest.approx(again.predicted, rel=1e-3)
    assert report.predicted_v1 == pytest.approx(again.predicted_v1, rel=1e-3)


@pytest.mark.cpu
def test_under_bfloat16_autocast_and_gradient_checkpointing(tmp_path):
    callback = FragilityCallback(every_n_steps=1)
    train(tmp_path, callback, bf16=True, gradient_checkpointing=True, max_steps=2)
    assert len(callback.history) == 2
    assert all(math.isfinite(report.predicted) for _, report in callback.history)


@pytest.mark.cpu
def test_attached_it_comes_first(tmp_path):
    callback = FragilityCallback()
    _, trainer = train(tmp_path, callback, attach=True, max_steps=1)
    assert trainer.callback_handler.callbacks[0] is callback
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1


@pytest.mark.cpu
def test_warnings_are_logged_with_their_steps(tmp_path, caplog):
    callback = FragilityCallback(every_n_steps=1, early_warning=EarlyWarning(span=1, warm_up=2, ratio=1.0001))
    _, trainer = train(tmp_path, callback, learning_rate=0.3)
    kappas = [max(row["kappa_softmax"] for row in report.rows) for _, report in callback.history]
    again = EarlyWarning(span=1, warm_up=2, ratio=1.0001)
    expected = [step for step, kappa in enumerate(kappas, 1) if again.observe(kappa)]
    assert callback.warned == expected != []
    assert trainer.state.log_history[-2]["fragility/warnings"] == len(expected)
    assert f"at step {expected[0]} is above its past" in caplog.text


@pytest.mark.cpu
@pytest.mark.parametrize("restore", [True, False])
def test_the_controller_acts_on_the_model_and_gives_it_back(tmp_path, restore):
    controller = NormEpsilonController(warm_up=2, percentile=1.0, base=1e-5, cooldown=0)
    callback = FragilityCallback(every_n_steps=1, controller=controller, restore_at_end=restore)
    before = tiny_model("llama").model.layers[0].input_layernorm.variance_epsilon
    _, trainer = train(tmp_path, callback, learning_rate=0.1)
    assert controller.actions
    changed = {layer for _, layer in controller.actions}
    for index, layer in enumerate(trainer.model.model.layers):
        raised = layer.input_layernorm.variance_epsilon > before
        assert raised == (index in changed and not restore)
    assert trainer.state.log_history[-2]["fragility/epsilon_actions"] == len(controller.actions)
    controller.restore()
    assert trainer.model.model.layers[0].input_layernorm.variance_epsilon == before


def test_the_heat_map(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    callback = FragilityCallback(every_n_steps=2)
    with pytest.raises(ValueError, match="nothing to plot"):
        callback.heat_map(tmp_path / "a.png")
    probe = FragilityProbe(tiny_model("llama"), v1=False)
    callback.history = [(step, probe.report(tokens(1, 12, seed=step))) for step in (1, 2, 4)]
    callback.heat_map(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"quantity must be one of .*risk.*, got 'colour'"):
        callback.heat_map(tmp_path / "b.png", "colour")
    drawn = []
    monkeypatch.setattr("hf_geoscale.stability.fragility_plot.heat_map", lambda *given: drawn.append(given))
    callback.heat_map("c.png", "kappa_softmax")
    values = [[row["kappa_softmax"] for row in report.rows] for _, report in callback.history]
    assert drawn == [([1, 2, 4], values, "c.png", "kappa_softmax")]


def test_a_controller_is_refused_in_several_processes():
    several = SimpleNamespace(world_size=2)
    callback = FragilityCallback(controller=NormEpsilonController())
    with pytest.raises(ValueError, match=r"needs training in one process, got 2: .*Pass controller=None"):
        callback.on_train_begin(several, None, None, model=tiny_model("llama"))
    assert callback.probe is None
    watching = FragilityCallback(batch=tokens(1, 8))
    watching.on_train_begin(several, None, None, model=tiny_model("llama"))
    assert watching.probe is not None


def test_what_is_refused():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        FragilityCallback(0)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        FragilityCallback(max_length=0)
    with pytest.raises(ValueError, match="precision must be one of"):
        FragilityCallback(precision="int8")

"""Adapters that move: scales never stay behind what the layers compute."""

import pytest
import torch

from hf_geoscale import GeoScaleCallback, geometry_report, patch_model, refresh_scales, unpatch_model
from hf_geoscale.integrations import geoscale_layers

from ..conftest import tiny_model, tokens
from .effective import assert_certified, overflows

peft = pytest.importorskip("peft")

from .adapters import adapted, lora, lora_layers  # noqa: E402 (needs peft)


@pytest.mark.feature("LoRA")
class TestStaleness:
    def test_loading_an_adapter(self):
        model, ids = patch_model(adapted("llama")), tokens(1, 12)
        model(ids)
        state = {n: 4 * v if "lora_B" in n else v for n, v in model.state_dict().items()}
        old = geoscale_layers(model)[0].geometry.q_bound.clone()
        model.load_state_dict(state)
        model(ids)
        assert (geoscale_layers(model)[0].geometry.q_bound > 1.3 * old).all()
        assert_certified(model)

    def test_a_step_moves_the_adapters_and_their_scales(self):
        model, ids = patch_model(adapted("llama", lora_dropout=0.1)).train(), tokens(2, 20)
        trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all((p != trained[n]).any() for n, p in model.named_parameters() if n in trained)
        model(ids)
        assert overflows(model) == 0
        assert_certified(model.eval())

    @pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
    def test_an_exponential_average_copied_in_through_data(self, mode):
        """Averages of weights write `param.data`, which counts as no write; evaluation and the change of mode see it."""
        model, ids = patch_model(adapted("llama")).train(mode), tokens(1, 12)
        model(ids)
        kept = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.data.copy_(10 * kept[name])
        model.eval()
        with torch.no_grad():
            model(ids)
        assert_certified(model)
        assert overflows(model) == 0
        large = geoscale_layers(model)[0].geometry.q_bound.clone()
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.data.copy_(kept[name])
        model.train(mode)
        model(ids)
        assert (geoscale_layers(model)[0].geometry.q_bound < large / 3).all()

    def test_an_unchanged_model_is_not_measured_again(self, monkeypatch):
        model, ids = patch_model(adapted("llama", lora_dropout=0.1)), tokens(1, 12)
        monkeypatch.setattr("hf_geoscale.integrations.layer.measure_layer", None)
        model(ids)
        with torch.no_grad():
            model(ids)

    def test_merging_in_training_is_seen(self):
        """PEFT merges through `.data`, which counts as no write, and training reads no checksums."""
        model, ids = patch_model(adapted("llama", lora_alpha=60)).train(), tokens(1, 12)
        model(ids)
        before = geoscale_layers(model)[0].weights_version
        model.merge_adapter()
        model(ids)
        assert geoscale_layers(model)[0].weights_version != before
        assert_certified(model)

    def test_writes_in_training_through_data_need_refresh_scales(self):
        model = patch_model(adapted("llama")).train()
        old = geoscale_layers(model)[0].geometry.q_bound.clone()
        for module in lora_layers(model):
            module.lora_B["a0"].weight.data.mul_(20)
        refresh_scales(model)
        assert (geoscale_layers(model)[0].geometry.q_bound > 2 * old).all()

    def test_scheduled_refreshes_come_every_step(self):
        """A weight made of a product has no drift budget, so the callback may not skip a step."""
        model = patch_model(adapted("llama"), headroom=4.0)
        assert {layer.max_weight_drift for layer in geoscale_layers(model)} == {0.0}


@pytest.mark.feature("LoRA with Trainer")
@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_the_trainer_trains_adapters(tmp_path, every_n_steps):
    from transformers import Trainer, TrainingArguments

    model = peft.get_peft_model(tiny_model("llama"), lora(lora_dropout=0.05))
    rows = tokens(8, 16)
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        report_to=[],
        use_cpu=not rows.is_cuda,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
    )
    callback = GeoScaleCallback(every_n_steps)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    assert geometry_report(model).rows[0]["calls"] == 4
    assert overflows(model) == 0
    assert callback.steps == 0  # refreshed after the last step
    unpatch_model(model)
    assert not geoscale_layers(model)

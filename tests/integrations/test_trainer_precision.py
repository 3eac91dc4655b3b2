"""Mixed precision around FP8 attention: bf16 and fp16 autocast, GradScaler, norms in float32."""

import logging
import math

import pytest
import torch
from transformers import TrainerState

from hf_geoscale import GeoScaleCallback, geometry_report, patch_model
from hf_geoscale.geometry import operand_bound
from hf_geoscale.integrations import geoscale_layers

from ..conftest import tiny_model, tokens
from .test_callback import trainer


def no_overflow(model) -> bool:
    return sum(row["overflows"] for row in geometry_report(model).rows) == 0


@pytest.mark.feature("bf16 AMP")
def test_bf16_trainer(tmp_path):
    losses = {}
    for bf16 in (False, True):
        model = tiny_model("llama")
        run = trainer(model, tmp_path, GeoScaleCallback(), bf16=bf16)
        run.train()
        losses[bf16] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert no_overflow(model)
        assert model.lm_head.weight.dtype == torch.float32
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=2**-7)  # logits carry 8 bits


@pytest.mark.feature("fp16 AMP")
class TestFloat16:
    def step(self, model, optimizer, scaler, ids) -> float:
        with torch.autocast(ids.device.type, torch.float16):
            loss = model(ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.item()

    def test_a_skipped_step_leaves_weights_and_scales(self):
        # a backward counts its overflows on every backend only while logits are observed
        model = patch_model(tiny_model("llama").train(), observe_logits=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = tokens(2, 24)
        device = ids.device.type
        scaler = torch.amp.GradScaler(device, init_scale=2.0**30)  # gradients overflow float16: the step is skipped
        layer = geoscale_layers(model)[0]
        weight, geometry = layer.site.attention.q_proj.weight.clone(), layer.geometry
        first = self.step(model, optimizer, scaler, ids)
        assert torch.equal(layer.site.attention.q_proj.weight, weight)
        assert scaler.get_scale() == 2.0**29
        again = self.step(model, optimizer, torch.amp.GradScaler(device, init_scale=2.0**10), ids)
        assert again == first  # the same weights under the same scales
        assert layer.geometry is geometry
        assert not torch.equal(layer.site.attention.q_proj.weight, weight)
        third = self.step(model, optimizer, torch.amp.GradScaler(device, init_scale=2.0**10), ids)
        assert third < first
        assert layer.geometry is not geometry
        report = geometry_report(model).rows
        assert {name for row in report for name, count in row["overflows_by_operand"].items() if count} == {
            "logit gradient"
        }

    def test_an_infinite_gradient_is_not_called_a_broken_certificate(self, caplog):
        model, callback = patch_model(tiny_model("llama"), observe_logits=True), GeoScaleCallback()
        callback.layers = geoscale_layers(model)
        state = TrainerState()
        (model(tokens(2, 24)).logits.sum() * math.inf).backward()
        with caplog.at_level(logging.WARNING):
            callback.on_log(None, state, None, logs={})
        assert "FP8 overflows so far; only of gradients that came in as Inf or NaN" in caplog.text
        caplog.clear()
        callback.layers[0].statistics.add_overflow("q", torch.ones((), dtype=torch.int64))
        with caplog.at_level(logging.WARNING):
            callback.on_log(None, state, None, logs={})
        assert "a certificate was exceeded, please report it" in caplog.text

    @pytest.mark.gpu
    def test_trainer(self, tmp_path):
        model = tiny_model("llama")
        run = trainer(model, tmp_path, GeoScaleCallback(), fp16=True, steps=6)
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        assert no_overflow(model)


@pytest.mark.feature("fp32 norms of k-bit preparation")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_norms_in_float32_over_a_bfloat16_model(family):
    """`prepare_model_for_kbit_training` leaves norms, embeddings and head in float32: float32 q and k reach the attention."""
    reference = tiny_model(family)
    model = tiny_model(family).to(torch.bfloat16)
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower() or isinstance(module, torch.nn.Embedding) or name == "lm_head":
            module.float()
    patch_model(model)
    ids = tokens(2, 24)
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    expected = patch_model(reference)(ids, labels=ids).loss
    assert loss.item() == pytest.approx(expected.item(), rel=2**-7)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert no_overflow(model)
    for layer in geoscale_layers(model):
        torch.testing.assert_close(
            layer.geometry.q_bound, operand_bound(layer.site.projections()[0]), rtol=1e-12, atol=0
        )

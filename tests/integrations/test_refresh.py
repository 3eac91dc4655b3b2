"""Refreshing a model's layers together: once a step, without waiting for a device, all or none."""

import copy
import pickle

import pytest
import torch

from benchmarks.families import tiny
from hf_geoscale import (
    NonFiniteWeightsError,
    UnsupportedModelError,
    geometry_report,
    patch_model,
    refresh_scales,
)
from hf_geoscale.geometry import measure_layer, operand_bound
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations import refresh as refreshing
from hf_geoscale.scaling import E4M3

from ..conftest import tiny_model, tokens
from ..host_reads import no_host_reads


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """Layers of each call of `measure_layers`."""
    counts: list[int] = []
    original = refreshing.measure_layers

    def spy(layers, *options, **kernels):
        counts.append(len(layers))
        return original(layers, *options, **kernels)

    monkeypatch.setattr(refreshing, "measure_layers", spy)
    return counts


@pytest.fixture
def far_away(monkeypatch):
    """As on a GPU: numbers need waiting for."""
    monkeypatch.setattr(refreshing.HostValues, "here", False)


def training_model(**config):
    model = patch_model(tiny_model("llama"), **config).train()
    model(tokens(1, 12))  # in training mode the version is another
    return model


def step(model, factor: float = 1.5) -> None:
    """A write that every layer's version counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def settle(model) -> None:
    layers = geoscale_layers(model)
    layers[0].group.settle(layers)


def assert_fresh(model) -> None:
    for layer in geoscale_layers(model):
        for projection, name in zip(layer.site.projections(), "qkv", strict=True):
            bound = operand_bound(projection)
            torch.testing.assert_close(getattr(layer.geometry, f"{name}_bound"), bound, rtol=1e-12, atol=0)
            expected = (E4M3.max / (layer.config.headroom * bound)).float()
            torch.testing.assert_close(getattr(layer.scaling.scales, name), expected, rtol=1e-6, atol=0)


class TestTogether:
    def test_one_measurement_of_all_layers_a_step(self, measured):
        model, ids = training_model(), tokens(1, 12)
        measured.clear()
        step(model)
        model(ids)
        assert measured == [2]
        assert_fresh(model)
        model(ids)
        assert measured == [2]

    def test_only_layers_that_changed(self, measured):
        model, ids = training_model(), tokens(1, 12)
        measured.clear()
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.mul_(3)
        model(ids)
        assert measured == [1]
        assert_fresh(model)

    @pytest.mark.parametrize("name", ["llama-bias-yarn", "qwen2", "qwen3", "gpt2-inverse-layer"])
    def test_the_same_as_alone(self, name):
        self.check(patch_model(tiny_model(name), headroom=2.0))

    @pytest.mark.parametrize("name", ["gemma3_text", "olmo2"])
    def test_local_layers_and_other_norms(self, name):
        self.check(patch_model(tiny(name), headroom=2.0))

    def check(self, model) -> None:
        step(model)
        refresh_scales(model)
        for layer in geoscale_layers(model):
            alone = measure_layer(*layer.site.projections(), layer.site.softmax_scale, headroom=2.0)
            for name in ("q_bound", "k_bound", "v_bound", "logit_bound"):
                mine, theirs = getattr(layer.geometry, name), getattr(alone, name)
                torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
            assert layer.max_weight_drift == pytest.approx(alone.max_weight_drift, rel=1e-12)
            amax = max(float(p.detach().abs().amax()) for p in layer.site.parameters())
            assert layer.weight_amax == amax
        assert_fresh(model)

    def test_weights_made_to_be_measured_are_not_all_held(self, measured, monkeypatch):
        model = patch_model(tiny_model("qwen3"))
        measured.clear()
        refresh_scales(model)
        assert measured == [2]
        monkeypatch.setattr(refreshing, "FRESH_BYTES", 0)
        refresh_scales(model)
        assert measured[1:] == [1, 1, 0]
        assert_fresh(model)

    def test_a_layer_that_cannot_be_read_fails_in_its_own_forward(self, measured):
        model = training_model()
        step(model)
        model.model.layers[1].self_attn.q_proj = torch.nn.Bilinear(2, 2, 2)
        geoscale_layers(model)[0].refresh_if_stale()
        assert measured[-1] == 1
        with pytest.raises(UnsupportedModelError, match="layer 1"):
            geoscale_layers(model)[1].refresh_if_stale()

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_are_refreshed_apart(self, how, measured):
        model, ids = training_model(headroom=2.0), tokens(1, 12)
        twin = how(model)
        refresh_scales(twin)  # a copy has measured nothing yet
        assert geoscale_layers(twin)[0].max_weight_drift == geoscale_layers(model)[0].max_weight_drift > 0
        old = geoscale_layers(model)[0].geometry.q_bound.clone()
        step(twin)
        twin(ids)
        assert torch.equal(geoscale_layers(model)[0].geometry.q_bound, old)
        assert_fresh(twin)
        measured.clear()
        step(twin)
        twin(ids)
        assert measured == [2]  # they have joined again


class TestNoWaiting:
    @pytest.mark.parametrize("headroom", [1.0, 4.0])
    def test_the_host_reads_nothing(self, far_away, headroom):
        model = training_model(headroom=headroom)
        for _ in range(2):
            step(model)
            settle(model)  # reads numbers of the step before, which came long ago
            with no_host_reads():
                refresh_scales(model)
        assert_fresh(model)

    def test_nor_in_the_forward(self, far_away):
        model = training_model()
        step(model)
        settle(model)
        with no_host_reads():
            for layer in geoscale_layers(model):
                layer.refresh_if_stale()
        assert_fresh(model)

    def test_nan_is_found_by_the_next_refresh_and_undone(self, far_away):
        model = training_model()
        layers = geoscale_layers(model)
        scales = [layer.scaling.scales.k.clone() for layer in layers]
        kept = model.model.layers[1].self_attn.k_proj.weight.detach().clone()
        step(model, 2.0)
        model.model.layers[1].self_attn.k_proj.weight.data[3] = float("nan")
        refresh_scales(model)
        with pytest.raises(NonFiniteWeightsError, match="make k in layer 1"):
            refresh_scales(model)
        for layer, old in zip(layers, scales, strict=True):
            assert torch.equal(layer.scaling.scales.k, old)
            assert layer.geometry.vectors.isfinite().all()
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.copy_(kept)
        refresh_scales(model)
        assert_fresh(model)

    def test_nan_is_found_by_the_next_forward_that_measures(self, far_away):
        model, ids = training_model(), tokens(1, 12)
        step(model, float("nan"))
        assert model(ids).logits.isnan().any()
        step(model)
        with pytest.raises(NonFiniteWeightsError, match="make q in layer 0"):
            model(ids)

    def test_mended_weights_go_on(self, far_away):
        """A rollback after a loss of NaN must not meet the NaN of before it."""
        model = training_model()
        good = {name: x.clone() for name, x in model.state_dict().items()}
        self.spoil(model)
        assert model(tokens(1, 12)).logits.isnan().any()
        model.load_state_dict(good)
        assert model(tokens(1, 12)).logits.isfinite().all()

    def test_an_optimizer_step_does_not_spread_it(self, far_away):
        model, ids = training_model(), tokens(1, 12)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.spoil(model)
        model(input_ids=ids, labels=ids).loss.backward()
        with pytest.raises(NonFiniteWeightsError, match="layer 1"):
            optimizer.step()
        assert sum(not p.isfinite().all() for p in model.parameters()) == 1

    def test_every_forward_raises_once_it_is_known(self, far_away):
        model = training_model()
        self.spoil(model)
        model(tokens(1, 12))
        for _ in range(3):
            with pytest.raises(NonFiniteWeightsError, match="layer 1"):
                refresh_scales(model)
            with pytest.raises(NonFiniteWeightsError, match="layer 1"):
                model(tokens(1, 12))

    def test_the_report_measures_and_looks(self, far_away):
        model = training_model()
        self.spoil(model)
        with pytest.raises(NonFiniteWeightsError, match="layer 1"):
            geometry_report(model)

    @staticmethod
    def spoil(model) -> None:
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan

    def test_waiting_finds_it_at_once(self, far_away):
        model = training_model()
        step(model, float("nan"))
        with pytest.raises(NonFiniteWeightsError, match="make q in layer 0"):
            refresh_scales(model, wait=True)

    def test_so_does_the_report(self, far_away):
        model = training_model()
        step(model, float("nan"))
        refresh_scales(model)
        with pytest.raises(NonFiniteWeightsError, match="make q in layer 0"):
            geometry_report(model)

    def test_the_first_measurement_is_waited_for(self, far_away):
        model = tiny_model("llama")
        step(model, float("nan"))
        with pytest.raises(NonFiniteWeightsError):
            patch_model(model)
        assert not geoscale_layers(model)


def test_utilisation_survives_refreshes():
    model, ids = training_model(), tokens(2, 12)
    layer = geoscale_layers(model)[0]
    before = layer.drain_utilisation()
    assert layer.drain_utilisation() is None
    assert layer.peak_utilisation == before > 0
    with torch.no_grad():
        layer.site.attention.q_proj.weight.div_(1e3)
        layer.site.attention.k_proj.weight.div_(1e3)
        layer.site.attention.v_proj.weight.div_(1e3)
    model(ids)
    refresh_scales(model)
    model(ids)
    later = layer.drain_utilisation()
    assert 0 < later < 1
    assert layer.peak_utilisation == max(before, later)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("headroom", [1.0, 4.0])
def test_a_step_and_a_refresh_never_wait_for_the_gpu(headroom):
    model = patch_model(tiny_model("llama").cuda().bfloat16().train(), headroom=headroom, backend="reference")
    ids = tokens(1, 64).cuda()
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        step(model, 1.01)
        refresh_scales(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, 1.01)
        refresh_scales(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_fresh(model)


def test_a_process_without_accelerator(monkeypatch):
    """There torch 2.6 raises when asked for it."""

    def none_there():
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", none_there)
    assert refreshing._devices.__wrapped__() == ("cpu",)

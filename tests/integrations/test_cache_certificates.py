"""Keys and values of a cache are held against the certificates of the weights."""

import pytest
import torch
from transformers import DynamicCache

from hf_geoscale import geometry_report, patch_model
from hf_geoscale.integrations import geoscale_layers

from ..conftest import tiny_model, tokens
from ..tolerances import OUTPUT_ERROR
from .compare import calls, relative


class TestCertificatesOfCaches:
    """Keys of a cache are held against the certificate: nobody knows which weights made them."""

    def continued(self, model, spoil, **options):
        model, ids = patch_model(model, **options), tokens(1, 150)
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids[:, :70], past_key_values=cache, use_cache=True)
            spoil(model, cache)
            return model(ids[:, 70:], past_key_values=cache, use_cache=True).logits

    @pytest.mark.feature("cache reuse")
    def test_of_other_weights(self):
        def shrink(model, cache):
            for layer in model.model.layers:
                layer.self_attn.k_proj.weight.mul_(1e-2)

        model = tiny_model("llama")
        self.continued(model, shrink)
        assert calls(model) == (1, {"uncertified cache": 1})

    @pytest.mark.feature("cache reuse")
    @pytest.mark.parametrize("operand", ["keys", "values"])
    def test_of_a_learnt_prefix(self, operand):
        def enlarge(model, cache):
            for layer, state in zip(cache.layers, geoscale_layers(model), strict=True):
                bound = (state.geometry.k_bound if operand == "keys" else state.geometry.v_bound).float()
                prefix = getattr(layer, operand)
                prefix[0, :, 3] = 0
                prefix[0, :, 3, 5] = 1.01 * bound

        model = tiny_model("llama")
        ours = self.continued(model, enlarge)
        assert calls(model) == (1, {"uncertified cache": 1})
        model = tiny_model("llama")
        ids, cache = tokens(1, 150), DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :70], past_key_values=cache, use_cache=True)
            twin = patch_model(tiny_model("llama"))
            enlarge(twin, cache)
            exact = model(ids[:, 70:], past_key_values=cache, use_cache=True).logits
        assert relative(ours, exact) < OUTPUT_ERROR

    @pytest.mark.feature("cache reuse")
    def test_an_untouched_one_passes(self):
        model = tiny_model("llama")
        self.continued(model, lambda *_: None)
        assert calls(model) == (2, {})

    @pytest.mark.feature("quantised cache")
    def test_a_lossy_one(self):
        """Eight bits a number, one step a tensor: what a quantised cache hands back."""

        def round_off(model, cache):
            for layer in cache.layers:
                for states in (layer.keys, layer.values):
                    step = states.abs().amax() / 127
                    states.copy_((states / step).round() * step)

        model = tiny_model("llama")
        ids = tokens(1, 150)
        exact = model(ids, use_cache=False).logits[:, 70:]
        assert relative(self.continued(model, round_off), exact) < OUTPUT_ERROR
        assert calls(model) == (2, {})

    @pytest.mark.feature("cache reuse")
    @pytest.mark.parametrize("scaling", ["current", "delayed"])
    def test_measured_scales_need_none(self, scaling):
        model = tiny_model("llama")
        self.continued(model, lambda *_: None, scaling=scaling)
        assert [row["calls"] for row in geometry_report(model).rows] == [2, 2]

"""Keywords of attention calls: each is honoured under every name that transformers has given it, or refused by name."""

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from hf_geoscale import UnsupportedAttentionError, geometry_report, patch_model
from hf_geoscale.integrations.attention import geoscale_attention_forward
from hf_geoscale.integrations.keywords import CACHE_NAMES

from ..conftest import tiny_model, tokens
from ..tolerances import OUTPUT_ERROR
from .compare import relative
from .test_front_end import attention_of

FUSED = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]


def operands():
    """q, k and v of a tiny Llama: (1, 4, 8, 16), (1, 2, 8, 16) twice."""
    return torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)


class TestCaches:
    @pytest.mark.parametrize("family", FUSED)
    @pytest.mark.parametrize("training", [True, False])
    def test_an_ordinary_forward_makes_one_whatever_its_keyword_is_called(self, family, training):
        model, ids = tiny_model(family).train(training), tokens(1, 24)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        plain = model(input_ids=ids).logits
        logits = patch_model(model, backend="reference")(input_ids=ids).logits
        assert relative(logits, plain) < OUTPUT_ERROR
        assert {row["calls"] for row in geometry_report(model).rows} == {1}

    @pytest.mark.parametrize("name", CACHE_NAMES)
    def test_one_that_holds_tokens_is_read_under_each_name(self, name):
        """A call under a name that this release has, so not by the fused forward."""
        model, hidden = tiny_model("llama"), torch.randn(1, 4, 64)
        attention = model.model.layers[0].self_attn
        angles = model.model.rotary_emb(hidden, torch.arange(4)[None])
        cache = DynamicCache()
        cache.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), 0)
        patch_model(model, backend="reference")
        assert not attention_of(model).forward.serves({name: cache, "position_embeddings": angles})
        assert attention.forward.serves({name: None, "position_embeddings": angles})

    @pytest.mark.parametrize("name", CACHE_NAMES)
    def test_a_paged_one_is_refused_by_its_class(self, name):
        model = patch_model(tiny_model("llama"))
        paged = object.__new__(PagedAttentionCache)
        with pytest.raises(UnsupportedAttentionError, match=r"paged cache .*PagedAttentionCache"):
            geoscale_attention_forward(attention_of(model), *operands(), None, **{name: paged})

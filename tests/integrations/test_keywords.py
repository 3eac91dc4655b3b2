"""Keywords of attention calls: each is honoured under every name that transformers has given it, or refused by name."""

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_geoscale import UnsupportedAttentionError, geometry_report, patch_model
from hf_geoscale.integrations.attention import geoscale_attention_forward
from hf_geoscale.integrations.keywords import CACHE_NAMES, parameters

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


class TestOfModels:
    """What a user gives the model, and what it passes down to the attention."""

    def test_those_of_trainers_losses_and_tokenizers_change_nothing(self):
        model, ids = patch_model(tiny_model("llama"), backend="reference"), tokens(2, 24)
        plain = model(ids, labels=ids, use_cache=False)
        given = {
            "num_items_in_batch": torch.tensor(46),
            "token_type_ids": torch.zeros_like(ids),
            "cache_position": torch.arange(24),
            "output_router_logits": False,
            "output_attentions": False,
            "position_bias": None,
            "never_heard_of": None,
        }
        told = model(ids, labels=ids, use_cache=False, **given)
        assert torch.equal(told.logits, plain.logits)
        torch.testing.assert_close(told.loss, plain.loss)
        assert {row["front_end_calls"] for row in geometry_report(model).rows} == {2}

    @pytest.mark.parametrize("fused", [True, False])
    def test_a_users_own_loss_names_its_own(self, fused):
        def loss(logits, labels, vocab_size, class_weights=None, **_):
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), class_weights)

        weights = torch.rand(96, generator=torch.Generator().manual_seed(0))
        model, ids = tiny_model("llama"), tokens(2, 24)
        model.loss_function = loss
        plain = model(ids, labels=ids, class_weights=weights).loss
        patch_model(model, backend="reference", fused_front_end=fused)
        torch.testing.assert_close(model(ids, labels=ids, class_weights=weights).loss, plain, rtol=OUTPUT_ERROR, atol=0)
        assert {row["calls"] for row in geometry_report(model).rows} == {1}

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("value", [1, False, torch.ones(1)], ids=["a number", "False", "a tensor"])
    def test_any_other_is_refused_by_name(self, family, fused, value):
        model = patch_model(tiny_model(family), fused_front_end=fused)
        hidden = torch.zeros(1, 4, 64)
        call = {"attention_mask": None, "never_heard_of": value}
        if family == "llama":
            call["position_embeddings"] = model.model.rotary_emb(hidden, torch.arange(4)[None])
        with pytest.raises(UnsupportedAttentionError, match=rf"keyword never_heard_of \({family} layer 0\)"):
            attention_of(model)(hidden, **call)

    @pytest.mark.parametrize("fused", [True, False])
    def test_a_callers_window_is_none_of_the_modules(self, fused):
        """Flash attention would honour it; SDPA, the mask of which has none, does not."""
        model, ids = patch_model(tiny_model("llama"), fused_front_end=fused), tokens(2, 24)
        with pytest.raises(UnsupportedAttentionError, match=r"keyword sliding_window \(llama layer 0\)"):
            model(ids, sliding_window=4)

    def test_with_a_fallback_it_goes_to_sdpa(self):
        model, ids = tiny_model("llama"), tokens(2, 24)
        plain = model(ids, never_heard_of=1).logits
        patch_model(model, fallback="sdpa")
        torch.testing.assert_close(model(ids, never_heard_of=1).logits, plain)
        assert geometry_report(model).rows[0]["fallback_reasons"] == {"its keyword never_heard_of": 1}

    def test_what_sdpa_has_itself_may_go_there(self):
        """transformers 5.24's SDPA takes a position bias; earlier ones do not."""
        bias = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        attention = attention_of(patch_model(tiny_model("llama"), fallback="sdpa"))
        if "position_bias" not in parameters(sdpa_attention_forward):
            with pytest.raises(UnsupportedAttentionError, match="a position bias on the logits"):
                geoscale_attention_forward(attention, *operands(), None, position_bias=bias)
            return
        q, k, v = (torch.randn_like(x) for x in operands())
        theirs, _ = sdpa_attention_forward(attention, q, k, v, None, scaling=0.25, position_bias=bias)
        ours, _ = geoscale_attention_forward(attention, q, k, v, None, scaling=0.25, position_bias=bias)
        torch.testing.assert_close(ours, theirs)

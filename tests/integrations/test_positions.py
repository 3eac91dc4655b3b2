"""Position ids that fall, repeat or jump: documents only where transformers reads them so, and a plain causal call otherwise."""

import logging
from itertools import product

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, PreTrainedTokenizerFast

from hf_geoscale import geometry_report, patch_model, unpatch_model
from hf_geoscale.integrations import attention, packing

from ..conftest import here, tiny_model, tokens
from ..tolerances import GRADIENT_ERROR, OUTPUT_ERROR
from .compare import calls, relative

LENGTH = 24
PLAIN = torch.arange(LENGTH)
POSITIONS = {
    "plain": PLAIN,
    "grouped": PLAIN // 3,
    "memory tokens": torch.cat([torch.arange(16), torch.arange(0, 16, 2)]),
    "one step back": torch.cat([torch.arange(20), torch.arange(3, 7)]),
    "gap": torch.cat([torch.arange(12), torch.arange(40, 52)]),
    "resets": torch.cat([torch.arange(9), torch.arange(15)]),
}
MASKS = ("none", "ones", "left padding")
DOCUMENTS, NO_DOCUMENTS = "read off position_ids", "fall or repeat"


def mask_of(kind: str, batch: int) -> torch.Tensor | None:
    mask = torch.ones(batch, LENGTH, dtype=torch.long)
    mask[0, : 5 if kind == "left padding" else 0] = 0
    return None if kind == "none" else mask


def logits_and_gradients(model, ids, mask, **call) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of real tokens, and the gradients of the projections' weights."""
    model.zero_grad()
    seen = torch.ones_like(ids) if mask is None else mask
    labels = ids.masked_fill((seen == 0) | (seen.cumsum(1) == 1), -100)  # no padding predicts a first token
    out = model(ids, attention_mask=mask, labels=labels, **call)
    out.loss.backward()
    grads = [p.grad.flatten() for name, p in model.named_parameters() if "proj.weight" in name or "attn.weight" in name]
    return out.logits[seen.bool()].detach(), torch.cat(grads)


def without_dropout(family: str):
    """In training, where the fused front end also serves calls that fill a cache."""
    model = tiny_model(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture(autouse=True)
def nothing_said_yet():
    packing.said.clear()


@pytest.mark.feature("packing")
@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3", "gpt2"])
def test_positions_mean_what_they_mean_to_sdpa(family, kind):
    model = without_dropout(family)
    cases = list(product(MASKS, (False, True), (1, 2)))

    def run(mask: str, cache: bool, batch: int):
        ids = tokens(2, LENGTH)[:batch]
        positions = POSITIONS[kind].to(ids.device).expand(batch, -1)
        return logits_and_gradients(model, ids, mask_of(mask, batch), use_cache=cache, position_ids=positions)

    exact = {case: run(*case) for case in cases}
    model.set_attn_implementation("eager")
    for case in cases:
        assert relative(run(*case)[0], exact[case][0]) < 1e-5, case
    model.set_attn_implementation("sdpa")
    for fused in (True, False):
        patch_model(unpatch_model(model), backend="reference", fused_front_end=fused)
        for case in cases:
            logits, gradients = run(*case)
            assert relative(logits, exact[case][0]) < OUTPUT_ERROR, (fused, *case)
            assert relative(gradients, exact[case][1]) < GRADIENT_ERROR, (fused, *case)
        assert calls(model) == (len(cases), {})
        assert geometry_report(model).rows[0]["front_end_calls"] == len(cases) * fused


@pytest.mark.parametrize("kind", ["grouped", "memory tokens", "one step back", "resets"])
def test_what_the_positions_mean_matters(kind):
    """The comparison above can fail: the two readings of these positions are far apart."""
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    positions = POSITIONS[kind][None].to(ids.device)
    documents, one = (model(ids, position_ids=positions, use_cache=cache).logits for cache in (False, True))
    assert relative(documents, one) > 4 * OUTPUT_ERROR


class TestSaidOnce:
    def lines(self, caplog, text: str) -> list[str]:
        return [record.getMessage() for record in caplog.records if text in record.getMessage()]

    @pytest.mark.parametrize("family", ["llama", "mistral-window"])
    def test_documents(self, family, caplog):
        model, ids = patch_model(tiny_model(family), backend="reference"), tokens(1, LENGTH)
        with caplog.at_level(logging.WARNING, "hf_geoscale"):
            for kind in ("plain", "resets", "grouped"):
                model(ids, position_ids=POSITIONS[kind][None].to(ids.device), use_cache=False)
        assert len(self.lines(caplog, DOCUMENTS)) == 1
        assert not self.lines(caplog, NO_DOCUMENTS)

    @pytest.mark.parametrize("given", ["mask", "cache"])
    def test_no_documents(self, given, caplog):
        model, ids = patch_model(tiny_model("llama"), backend="reference"), tokens(1, LENGTH)
        call = {"attention_mask": torch.ones_like(ids), "use_cache": False} if given == "mask" else {"use_cache": True}
        with caplog.at_level(logging.WARNING, "hf_geoscale"):
            for kind in ("plain", "gap", "resets", "grouped"):
                model(ids, position_ids=POSITIONS[kind][None].to(ids.device), **call)
        (line,) = self.lines(caplog, NO_DOCUMENTS)
        assert "use_cache=False" in line
        assert "cu_seq_lens" in line
        assert not self.lines(caplog, DOCUMENTS)

    def test_what_the_line_says_helps(self, caplog):
        """Both remedies give the documents, and silence."""
        model, ids = tiny_model("llama"), tokens(1, LENGTH)
        positions = POSITIONS["resets"][None].to(ids.device)
        exact = model(ids, position_ids=positions, use_cache=False).logits
        patch_model(model, backend="reference")
        lengths = torch.tensor([0, 9, LENGTH], dtype=torch.int32)
        with caplog.at_level(logging.WARNING, "hf_geoscale"):
            by_positions = model(ids, position_ids=positions, use_cache=False).logits
            by_lengths = model(ids, position_ids=positions, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths).logits
        assert relative(by_positions, exact) < OUTPUT_ERROR
        assert relative(by_lengths, exact) < OUTPUT_ERROR
        assert not self.lines(caplog, NO_DOCUMENTS)

    def test_padding_and_windows_are_neither(self, caplog):
        """Positions that transformers counts for padded rows stand still there; a window and a prefix cut no documents."""
        for family in ("llama", "mistral-window"):
            model, ids = patch_model(tiny_model(family), backend="reference"), tokens(2, LENGTH)
            mask = mask_of("left padding", 2)
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
            with caplog.at_level(logging.WARNING, "hf_geoscale"):
                model(ids)
                model(ids, use_cache=False)
                for cache in (True, False):
                    model(ids, attention_mask=mask, position_ids=positions, use_cache=cache)
                model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3)
        assert not self.lines(caplog, DOCUMENTS) + self.lines(caplog, NO_DOCUMENTS)


@pytest.fixture
def visibilities(monkeypatch) -> list:
    """Every visibility that reaches the kernels."""
    seen, attend = [], attention.fp8_attention

    def spy(*args, **kwargs):
        seen.append((kwargs["causal"], kwargs["window"], kwargs["key_range"]))
        return attend(*args, **kwargs)

    monkeypatch.setattr(attention, "fp8_attention", spy)
    return seen


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="</s>"
    )


@pytest.mark.feature("padding")
class TestPlainCausal:
    """Causal rows without key ranges: the calls whose dS the Hopper kernels store, and whose tiles need no mask."""

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3", "gpt2"])
    def test_the_padding_collator_on_equal_lengths(self, family, use_cache, visibilities):
        features = [{"input_ids": row.tolist()} for row in tokens(3, LENGTH)]
        batch = DataCollatorForLanguageModeling(tokenizer(), mlm=False)(features)
        assert bool(batch["attention_mask"].all())
        model = patch_model(tiny_model(family).train(), backend="reference")
        batch = {name: x.to(here()) for name, x in batch.items()}
        model(**batch, use_cache=use_cache).loss.backward()
        window = 9 if family == "mistral-window" else None
        assert visibilities == [(True, window, None)] * 2

    def test_on_unequal_lengths_it_takes_ranges(self, visibilities):
        features = [{"input_ids": row.tolist()} for row in (*tokens(2, LENGTH), tokens(1, 11)[0])]
        batch = DataCollatorForLanguageModeling(tokenizer(), mlm=False)(features)
        patch_model(tiny_model("llama"), backend="reference")(**{name: x.to(here()) for name, x in batch.items()})
        assert all(key_range is not None for _, _, key_range in visibilities)

    @pytest.mark.parametrize("kind", POSITIONS)
    def test_whatever_the_positions(self, kind, visibilities):
        model, ids = patch_model(tiny_model("llama"), backend="reference"), tokens(2, LENGTH)
        model(ids, attention_mask=torch.ones_like(ids), position_ids=POSITIONS[kind][None].to(here()), use_cache=False)
        assert visibilities == [(True, None, None)] * 2


@pytest.mark.feature("packing")
def test_the_flattening_collator_without_lengths():
    """Its positions are documents without a cache, as in every Trainer of transformers 5 and TRL, and one document with one."""
    features = [{"input_ids": row.tolist()} for row in (tokens(1, 9)[0], tokens(1, 15, seed=1)[0])]
    batch = {k: x.to(here()) for k, x in DataCollatorWithFlattening()(features, return_tensors="pt").items()}
    assert "attention_mask" not in batch
    model = tiny_model("llama").train()
    exact = {cache: model(**batch, use_cache=cache).logits for cache in (True, False)}
    patch_model(model, backend="reference")
    for cache, logits in exact.items():
        assert relative(model(**batch, use_cache=cache).logits, logits) < OUTPUT_ERROR
    assert relative(exact[True], exact[False]) > 2 * OUTPUT_ERROR

"""Packed documents: by position ids and by cumulative lengths, each document as if it were alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_geoscale import UnsupportedAttentionError, geometry_report, patch_model, unpatch_model
from hf_geoscale.integrations.packing import documents_of_lengths
from hf_geoscale.kernels.backend import triton_missing

from ..conftest import here, tiny_model, tokens
from ..tolerances import FUSED_RUNS, GRADIENT_ERROR, OUTPUT_ERROR
from .compare import calls, relative, same_attention

DOCUMENTS = (15, 1, 24)
LENGTH = sum(DOCUMENTS)
POSITIONS = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
CU_SEQ_LENS = torch.tensor([0, 15, 16, 40], dtype=torch.int32)


def lengths(cu_seq_lens=CU_SEQ_LENS) -> dict:
    cu_seq_lens = cu_seq_lens.to(here())
    return {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens, "max_length_q": 24, "max_length_k": 24}


def alone(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of each document in a forward of its own, one after the other."""
    return torch.cat([model(document).logits for document in ids.split(DOCUMENTS, dim=1)], dim=1)


PACKINGS = {
    "positions": {"position_ids": POSITIONS, "use_cache": False},
    "lengths": {"use_cache": False, **lengths()},
    "lengths and positions": {"position_ids": POSITIONS, "use_cache": False, **lengths()},
    "lengths and positions, with a cache": {"position_ids": POSITIONS, "use_cache": True, **lengths()},
    "lengths, with a mask of ones": {"attention_mask": torch.ones(1, LENGTH), "use_cache": False, **lengths()},
}


def packing(how: str) -> dict:
    """Arguments of a forward, with their tensors where the model is."""
    return {name: x.to(here()) if isinstance(x, torch.Tensor) else x for name, x in PACKINGS[how].items()}


@pytest.mark.feature("packing")
@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
@pytest.mark.parametrize("how", PACKINGS)
class TestDocuments:
    def test_each_is_as_if_alone(self, family, how):
        model, ids = tiny_model(family), tokens(1, LENGTH)
        exact = alone(model, ids)
        for backend, tolerance in same_attention().items():
            patch_model(unpatch_model(model), backend=backend)
            ours = model(ids, **packing(how)).logits
            assert calls(model) == (1, {})
            assert relative(ours, exact) < OUTPUT_ERROR
            if "positions" in how:  # the same rotations, hence the same roundings of q and k; sums in another order
                assert relative(ours, alone(model, ids)) < tolerance
        assert relative(model(ids).logits, exact) > 2 * OUTPUT_ERROR  # packing matters

    def test_no_document_sees_another(self, family, how):
        model, ids = patch_model(tiny_model(family)), tokens(1, LENGTH)
        other = ids.clone()
        other[:, :15] = tokens(1, 15, seed=1)
        with torch.no_grad():
            a, b = (model(x, **packing(how)).logits for x in (ids, other))
        assert torch.equal(a[:, 15:], b[:, 15:])
        assert not torch.equal(a[:, :15], b[:, :15])


@pytest.mark.feature("packing")
class TestLengths:
    @pytest.mark.parametrize("position_ids", [True, False])
    def test_the_flattening_collator_of_transformers(self, position_ids):
        features = [{"input_ids": document[0].tolist()} for document in tokens(1, LENGTH).split(DOCUMENTS, dim=1)]
        collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=position_ids)
        batch, model = collate(features, return_tensors="pt"), tiny_model("llama").train()
        assert "cu_seq_lens_q" in batch
        exact = alone(model, batch["input_ids"])
        patch_model(model)
        out = model(**batch)
        out.loss.backward()
        assert calls(model) == (1, {})
        assert relative(out.logits, exact) < OUTPUT_ERROR

    def test_the_padding_free_collator_of_trl(self):
        collators = pytest.importorskip("trl.trainer.sft_trainer")
        features = [{"input_ids": document[0].tolist()} for document in tokens(1, LENGTH).split(DOCUMENTS, dim=1)]
        batch = collators.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(features)
        model = tiny_model("llama").train()
        exact = alone(model, batch["input_ids"])
        patch_model(model)
        logits = model(
            **batch, use_cache=False
        ).logits  # as TRL calls it; with a cache transformers 4 reads no documents
        assert relative(logits, exact) < OUTPUT_ERROR
        assert calls(model) == (1, {})

    def test_gradients(self):
        model, ids = tiny_model("llama").train(), tokens(1, LENGTH)
        grads = []
        for how in ("positions", "lengths", "lengths and positions", "lengths and positions, with a cache"):
            model.zero_grad()
            model(ids, labels=ids, **packing(how)).loss.backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            patch_model(model, fused_front_end=False)  # after the first, exact one
        assert all(relative(grad, grads[0]) < GRADIENT_ERROR for grad in grads[1:])
        assert torch.equal(grads[2], grads[3])

    @pytest.mark.gpu
    def test_gradients_through_the_fused_front_end(self):
        """A cache that training only fills changes nothing; the interface rounds q and k elsewhere."""
        ids, grads = tokens(1, LENGTH), []
        if reason := triton_missing(ids.device):
            pytest.skip(reason)
        how = "lengths and positions"
        runs = ((how, True), (f"{how}, with a cache", True), (how, False))
        for how, fused in runs:
            model = patch_model(tiny_model("llama"), backend="triton", fused_front_end=fused).train()
            model(ids, labels=ids, **packing(how)).loss.backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            assert [row["front_end_calls"] for row in geometry_report(model).rows] == [int(fused)] * 2
        assert torch.equal(grads[0], grads[1])
        assert relative(grads[0], grads[2]) < FUSED_RUNS

    def test_gradient_checkpointing(self):
        grads = []
        for checkpoint in (False, True):
            model, ids = patch_model(tiny_model("llama")).train(), tokens(1, LENGTH)
            if checkpoint:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model(ids, labels=ids, use_cache=False, **lengths()).loss.backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert torch.equal(*grads)

    def test_two_rows_of_documents(self):
        """FlashAttention's cumulative lengths count through the flattened batch."""
        model, ids = tiny_model("llama"), tokens(2, LENGTH)
        bounds = torch.tensor([0, 15, 16, 40, 55, 56, 80])
        exact = torch.cat([alone(model, row[None]) for row in ids])
        patch_model(model)
        assert relative(model(ids, use_cache=False, **lengths(bounds)).logits, exact) < OUTPUT_ERROR

    def test_lengths_narrow_a_mask(self):
        model, ids = tiny_model("llama"), tokens(1, LENGTH)
        padding = torch.ones(1, LENGTH)
        padding[:, :3] = 0
        dense = torch.ones(LENGTH, LENGTH).tril().bool()
        document = (POSITIONS[0].to(here()) == 0).cumsum(0)
        dense &= document[:, None] == document
        dense[:, :3] = False
        exact = model(ids, attention_mask=dense[None, None]).logits
        patch_model(model)
        ours = model(ids, attention_mask=padding, use_cache=False, **lengths()).logits
        assert relative(ours[:, 3:], exact[:, 3:]) < OUTPUT_ERROR

    def test_a_batch_that_reuses_its_tensor_is_read_again(self):
        model, ids, bounds = patch_model(tiny_model("llama")), tokens(1, LENGTH), CU_SEQ_LENS.to(here(), copy=True)
        with torch.no_grad():
            first = model(ids, use_cache=False, **lengths(bounds)).logits
            bounds[1] = 9
            assert not torch.equal(model(ids, use_cache=False, **lengths(bounds)).logits, first)

    @pytest.mark.parametrize(
        ("bounds", "message"),
        [
            ([0, 15, 39], r"rise from 0 to the 40 tokens.*\[0, 15, 39\]"),
            ([1, 40], r"rise from 0 to the 40 tokens.*\[1, 40\]"),
            ([0, 20, 10, 40], r"rise from 0"),
            ([40], r"rise from 0"),
            ([[0, 40]], r"got \(1, 2\)"),
            ([0, 20, 40], "disagree: a position falls inside a document"),
        ],
    )
    def test_bad_lengths_are_named(self, bounds, message):
        model = patch_model(tiny_model("llama"))
        with pytest.raises(ValueError, match=message):
            model(
                tokens(1, LENGTH), position_ids=POSITIONS.to(here()), use_cache=False, **lengths(torch.tensor(bounds))
            )

    def test_lengths_that_do_not_fit_are_named(self):
        model = patch_model(tiny_model("llama"))
        with pytest.raises(ValueError, match="may span two rows of the batch, each of 20"):
            model(tokens(2, 20), use_cache=False, **lengths())
        other = {**lengths(), "cu_seq_lens_k": torch.tensor([0, 40])}
        with pytest.raises(ValueError, match="cu_seq_lens_k to be the same"):
            model(tokens(1, LENGTH), use_cache=False, **other)

    def test_with_a_past_they_are_refused(self):
        model, ids = patch_model(tiny_model("llama")), tokens(1, LENGTH)
        past = model(ids, use_cache=True).past_key_values
        with pytest.raises(UnsupportedAttentionError, match="cu_seq_lens_q says nothing of the keys in a cache"):
            model(ids, past_key_values=past, **lengths())


@pytest.mark.feature("packing")
class TestRanges:
    def test_of_lengths(self):
        bounds = torch.tensor([0, 2, 2, 3, 6])  # one document is empty
        ranges = documents_of_lengths(bounds, bounds.clone(), None, 2, 3)
        assert ranges.tolist() == [[[0, 2], [0, 2], [2, 3]], [[0, 3]] * 3]

    def test_of_lengths_whatever_the_default_device(self):
        bounds = torch.tensor([0, 2, 6], device="cpu")
        expected = documents_of_lengths(bounds, None, None, 1, 6)
        with torch.device("meta"):
            ranges = documents_of_lengths(bounds.clone(), None, None, 1, 6)
        assert torch.equal(ranges, expected)

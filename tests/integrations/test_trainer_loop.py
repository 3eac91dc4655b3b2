"""What a `Trainer` does around the attention: accumulation, checkpointing, sampling, evaluation, saving, flattening."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, DataCollatorWithFlattening, Trainer

from hf_geoscale import GeoScaleCallback, geometry_report, patch_model
from hf_geoscale.geometry import operand_bound
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.scaling import GeometryScaling

from ..cli.conftest import text_file, tiny_folder  # noqa: F401
from ..conftest import tiny_model, tokens
from ..tolerances import BF16_LOSSES
from .compare import same_attention
from .test_callback import trainer


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def rows(model, column: str) -> list:
    return [row[column] for row in geometry_report(model).rows]


@pytest.mark.feature("Gradient accumulation")
class TestAccumulation:
    def train(self, folder, batch: int, accumulate: int):
        model = tiny_model("llama")
        run = trainer(
            model,
            folder,
            GeoScaleCallback(),
            steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            optim="sgd",  # Adam would turn rounding noise into whole steps
            learning_rate=0.1,
            warmup_steps=0,
        )
        run.train()
        return run, model

    def test_equals_one_big_batch(self, tmp_path):
        (small, a), (big, b) = self.train(tmp_path, 1, 4), self.train(tmp_path, 4, 1)
        assert rows(a, "calls") == [12, 12]
        assert rows(b, "calls") == [3, 3]
        assert losses(small) == pytest.approx(losses(big), rel=1e-6)
        for name, weight in weights(a).items():
            torch.testing.assert_close(weight, b.get_parameter(name), rtol=1e-4, atol=1e-6, msg=name)

    def test_scales_stay_the_same_within_a_window(self, tmp_path, monkeypatch):
        used: list[torch.Tensor] = []
        original = GeometryScaling.quant_scales
        model = tiny_model("llama")
        first = patch_model(model).model.layers[0].self_attn.geoscale.scaling

        def quant_scales(scaling, *call):
            scales = original(scaling, *call)
            if scaling is first:
                used.append(scales.q.clone())
            return scales

        monkeypatch.setattr(GeometryScaling, "quant_scales", quant_scales)
        trainer(model, tmp_path, GeoScaleCallback(), steps=2, gradient_accumulation_steps=3, warmup_steps=0).train()
        assert len(used) == 6
        assert all(torch.equal(scale, used[0]) for scale in used[:3])
        assert all(torch.equal(scale, used[3]) for scale in used[3:])
        assert not torch.equal(used[2], used[3])


@pytest.mark.feature("Gradient checkpointing")
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2 trains with dropout
def test_checkpointing_changes_no_bit(tmp_path, family):
    trained = {}
    for reentrant in (None, False, True):
        model = tiny_model(family)
        options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        run = trainer(model, tmp_path, GeoScaleCallback(), steps=2, gradient_checkpointing=bool(options), **options)
        run.train()
        assert rows(model, "calls") == [2 if reentrant is None else 4] * 2  # the recomputation counts
        trained[reentrant] = losses(run), weights(model)
    for reentrant in (False, True):
        assert trained[reentrant][0] == trained[None][0]
        assert all(torch.equal(w, trained[None][1][name]) for name, w in trained[reentrant][1].items())


@pytest.mark.feature("Sampling by length")
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_grouped_by_length_are_padded(tmp_path, tiny_folder, side):  # noqa: F811
    from transformers import AutoTokenizer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, pad_token="!", padding_side=side)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    data = [{"input_ids": tokens(1, length)[0].tolist()} for length in (5, 30, 7, 28, 9, 26, 11, 24)]
    by_length = (
        {"train_sampling_strategy": "group_by_length"}
        if hasattr(TrainingArguments, "train_sampling_strategy")
        else {"group_by_length": True}
    )
    run = trainer(model, tmp_path, GeoScaleCallback(), steps=4, **by_length)
    run.train_dataset, run.data_collator = data, DataCollatorForLanguageModeling(tokenizer, mlm=False)
    padded = []
    run.data_collator = lambda rows, collate=run.data_collator: (
        padded.append(int((out := collate(rows))["attention_mask"].min()) == 0) or out
    )
    run.train()
    assert any(padded)
    assert rows(model, "calls") == [4, 4]
    assert rows(model, "fallback_calls") == rows(model, "overflows") == [0, 0]


@pytest.mark.feature("Evaluation in the loop")
class TestEvaluation:
    def test_without_training(self, tmp_path):
        model = tiny_model("llama")
        run = trainer(model, tmp_path, GeoScaleCallback())
        before = run.evaluate()["eval_loss"]
        with torch.no_grad():
            for block in model.model.layers:
                block.self_attn.k_proj.weight.mul_(50)  # nobody tells the callback
        after = run.evaluate()["eval_loss"]
        assert after != before
        assert rows(model, "calls") == [2, 2]
        assert rows(model, "overflows") == [0, 0]
        for layer in geoscale_layers(model):
            torch.testing.assert_close(
                layer.geometry.k_bound, operand_bound(layer.site.projections()[1]), rtol=1e-12, atol=0
            )

    def test_evaluating_changes_no_bit_of_training(self, tmp_path):
        trained = []
        for strategy in ("no", "steps"):
            model = tiny_model("llama")
            run = trainer(model, tmp_path, GeoScaleCallback(), eval_strategy=strategy, eval_steps=1)
            run.train()
            trained.append((losses(run), weights(model)))
        assert trained[0][0] == trained[1][0]
        assert all(torch.equal(w, trained[1][1][name]) for name, w in trained[0][1].items())


@pytest.mark.feature("Save and load")
def test_a_saved_patched_model_is_an_ordinary_one(tmp_path):
    model = tiny_model("llama")
    run = trainer(model, tmp_path, GeoScaleCallback(), steps=2)
    run.train()
    run.save_model(str(tmp_path / "model"))
    assert "geoscale" not in json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.state_dict().keys() == model.state_dict().keys()
    ids = tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(patch_model(loaded).eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.feature("Padding-free batches")
class TestFlattening:
    """`DataCollatorWithFlattening`: sequences end to end in one row, told apart by their position ids."""

    LENGTHS = (5, 17, 12, 9)

    def data(self) -> list[dict]:
        return [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in self.LENGTHS]

    def test_loss_is_that_of_the_sequences_apart(self, tmp_path):
        """On a GPU also in the fused kernels, at other keys of their tiles: logits of about 1 that FUSED_RUNS moves are an error of
        0.07 nats a token, or 0.01 of 4.8 in the mean over 39 tokens: half of BF16_LOSSES."""
        model, batch = tiny_model("llama"), DataCollatorWithFlattening()(self.data())
        for backend in same_attention():
            patch_model(model, backend=backend)
            with torch.no_grad():
                together = float(model(**batch, use_cache=False).loss) * sum(n - 1 for n in self.LENGTHS)
                apart = 0.0
                for row in self.data():
                    ids = torch.tensor([row["input_ids"]])
                    apart += float(model(ids, labels=ids, use_cache=False).loss) * (ids.shape[1] - 1)
            assert together == pytest.approx(apart, rel=1e-5 if backend == "reference" else BF16_LOSSES)
        assert rows(model, "fallback_calls") == [0, 0]

    def test_in_a_trainer(self, tmp_path):
        model = tiny_model("llama")
        run = trainer(model, tmp_path, GeoScaleCallback(), steps=2)
        run.train_dataset, run.data_collator = self.data(), DataCollatorWithFlattening()
        run.train()
        assert rows(model, "calls") == [2, 2]
        assert rows(model, "fallback_calls") == rows(model, "overflows") == [0, 0]

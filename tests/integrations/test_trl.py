"""TRL's trainers: supervised fine-tuning with packing and without padding, DPO against a reference model."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_geoscale import GeoScaleCallback, GeoScaleConfig, geometry_report, patch_model
from hf_geoscale.integrations import geoscale_layers, patched_layers

from ..cli.conftest import text_file, tiny_folder  # noqa: F401
from ..conftest import here

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ARGUMENTS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,  # collators build their tensors where the model is
    "learning_rate": 1e-3,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": 32,
}
SENTENCES = [
    "The assert statement is a convenient way to insert debugging assertions.",
    "Names refer to objects.",
    "A block is a piece of program text that is executed as a unit: a module, a function body, a class definition.",
    "An empty suite.",
] * 2


@pytest.fixture
def tokenizer(tiny_folder):  # noqa: F811
    return AutoTokenizer.from_pretrained(tiny_folder, pad_token="!", eos_token="~")


def counts(model) -> list[tuple[int, int, int]]:
    return [(row["calls"], row["fallback_calls"], row["overflows"]) for row in geometry_report(model).rows]


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


class TestSFT:
    def train(self, tiny_folder, tokenizer, tmp_path, patched=True, **options):  # noqa: F811
        run = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32),
            args=trl.SFTConfig(output_dir=str(tmp_path), use_cpu=here().type == "cpu", **ARGUMENTS | options),
            train_dataset=datasets.Dataset.from_dict({"text": SENTENCES}),
            processing_class=tokenizer,
            callbacks=[GeoScaleCallback()] if patched else [],
        )
        run.train()
        return run

    @pytest.mark.feature("TRL SFTTrainer")
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"packing": True, "packing_strategy": "wrapped"},
            pytest.param({"packing": True}, marks=pytest.mark.feature("TRL packing")),
            pytest.param({"padding_free": True, "max_length": None}, marks=pytest.mark.feature("TRL padding-free")),
        ],
        ids=["padded", "packed, wrapped", "packed", "padding-free"],
    )
    def test_losses_are_those_of_sdpa(self, tiny_folder, tokenizer, tmp_path, options):  # noqa: F811
        run = self.train(tiny_folder, tokenizer, tmp_path, **options)
        plain = self.train(tiny_folder, tokenizer, tmp_path, patched=False, **options)
        assert counts(run.model) == [(2, 0, 0)] * 2
        assert losses(run) == pytest.approx(losses(plain), rel=1e-3)
        assert losses(run) != losses(plain)


PAIRS = {
    "prompt": ["Names refer to", "A block is", "An empty", "The assert"] * 2,
    "chosen": [" objects.", " a piece of program text.", " suite.", " statement."] * 2,
    "rejected": [" nothing.", " blue.", " sky of stars.", " verb."] * 2,
}


@pytest.mark.feature("TRL DPOTrainer")
class TestDPO:
    def trainer(self, model, tokenizer, tmp_path, reference=None, callbacks=()):
        arguments = {**ARGUMENTS, "max_length": 64, "use_cpu": here().type == "cpu"}
        return trl.DPOTrainer(
            model=model,
            ref_model=reference,
            args=trl.DPOConfig(output_dir=str(tmp_path), **arguments),
            train_dataset=datasets.Dataset.from_dict(PAIRS),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )

    def model(self, folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def check(self, run):
        assert losses(run)[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference start equal, bit for bit
        assert losses(run)[1] < losses(run)[0]
        assert counts(run.model) == [(2, 0, 0)] * 2
        frozen = run.accelerator.unwrap_model(run.ref_model)
        assert counts(frozen) == [(2, 0, 0)] * 2
        for mine, theirs in zip(geoscale_layers(run.model), geoscale_layers(frozen), strict=True):
            assert mine.config == theirs.config
            assert not torch.equal(mine.geometry.q_bound, theirs.geometry.q_bound)  # each from its own weights

    def test_explicit_reference(self, tiny_folder, tokenizer, tmp_path):  # noqa: F811
        run = self.trainer(self.model(tiny_folder), tokenizer, tmp_path, self.model(tiny_folder))
        GeoScaleCallback().attach(run)
        run.train()
        self.check(run)

    @pytest.mark.parametrize("patched_before", [False, True])
    def test_reference_that_trl_makes(self, tiny_folder, tokenizer, tmp_path, patched_before):  # noqa: F811
        model = self.model(tiny_folder)
        if patched_before:
            patch_model(model)
        run = self.trainer(model, tokenizer, tmp_path)
        GeoScaleCallback().attach(run)
        run.train()
        self.check(run)

    @pytest.mark.parametrize("precision", ["standard", "high"])
    def test_a_reference_with_the_name_alone(self, tiny_folder, tokenizer, tmp_path, precision, caplog):  # noqa: F811
        """TRL copies the name to the reference that it builds; its first forward patches it, with the default configuration."""
        model = patch_model(self.model(tiny_folder), precision=precision)
        run = self.trainer(model, tokenizer, tmp_path)
        if patched_layers(run.ref_model):  # TRL 0.24 copies the policy itself, with its configuration
            run.train()
            return self.check(run)
        with caplog.at_level(logging.WARNING):
            run.train()
        reference = run.accelerator.unwrap_model(run.ref_model)
        assert {layer.config for layer in geoscale_layers(reference)} == {GeoScaleConfig()}
        said = "GeoScaleCallback().attach(trainer) gives a reference model its policy's" in caplog.text
        assert said == (precision == "high")
        if precision == "standard":
            self.check(run)

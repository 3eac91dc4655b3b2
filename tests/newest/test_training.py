"""What trains: Trainer with the callback, PEFT, TRL, Liger-Kernel and torchao, each against itself on SDPA."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.models.llama import modeling_llama

from hf_geoscale import GeoScaleCallback, patch_model

from ..cli.conftest import text_file, tiny_folder  # noqa: F401
from ..conftest import tiny_model, tokens
from .control import Outcome, compare
from .test_models import gradients, without_dropout

ARGUMENTS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "learning_rate": 0.05,
    "optim": "sgd",  # updates are linear in gradients
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "use_cpu": True,
}
METRICS = {"geoscale/utilisation", "geoscale/overflows"}


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens(8, 24)]


def attention_weights(model: nn.Module) -> Tensor:
    parts = [p.detach().flatten() for name, p in model.named_parameters() if "attn" in name and p.requires_grad]
    return torch.cat(parts).clone()


def trained(trainer: Trainer, patched: bool) -> Outcome:
    """The change of every trained weight of the attention; the metrics must be in the log exactly where it is patched."""
    before = attention_weights(trainer.model)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("geoscale/")}
    assert logged >= METRICS if patched else not logged
    return Outcome({}, {"update": attention_weights(trainer.model) - before}, trainer.model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["callbacks=[...]", "add_callback", "patched before"])
def test_trainer(family, how, tmp_path):
    def scenario(patched: bool) -> Outcome:
        model = without_dropout(tiny_model(family))
        if patched and how == "patched before":
            patch_model(model)
        given = [GeoScaleCallback()] if patched and how != "add_callback" else []
        args = TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS)
        trainer = Trainer(model=model, args=args, train_dataset=rows(), callbacks=given)
        if patched and how == "add_callback":
            trainer.add_callback(GeoScaleCallback())
        return trained(trainer, patched)

    compare(scenario)


def test_metrics_reach_tensorboard(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def scenario(patched: bool) -> Outcome:
        folder = tmp_path / str(patched)
        args = TrainingArguments(output_dir=str(folder), **ARGUMENTS | {"report_to": "tensorboard"})
        model, given = tiny_model("llama"), [GeoScaleCallback()] if patched else []
        outcome = trained(Trainer(model=model, args=args, train_dataset=rows(), callbacks=given), patched)
        (events,) = folder.rglob("events.out.*")
        accumulator = accumulators.EventAccumulator(str(events)).Reload()
        tags = {tag for group in accumulator.Tags().values() if isinstance(group, list) for tag in group}
        assert any("loss" in tag for tag in tags)
        assert any("geoscale/" in tag for tag in tags) == patched, tags
        return outcome

    compare(scenario)


def test_the_name_alone(tiny_folder):  # noqa: F811
    """`attn_implementation="geoscale"`, which patches in the first forward."""

    def scenario(patched: bool) -> Outcome:
        name = "geoscale" if patched else "sdpa"
        model = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation=name).train()
        ids = tokens(2, 24)
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        return Outcome({"logits": out.logits.detach()}, gradients(model), model)

    compare(scenario)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft(family):
    """LoRA's gradients, and the merged model."""
    peft = pytest.importorskip("peft")

    def scenario(patched: bool) -> Outcome:
        torch.manual_seed(0)
        targets = ["c_attn"] if family == "gpt2" else ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        model, ids = peft.get_peft_model(without_dropout(tiny_model(family)), config), tokens(2, 24)
        if patched:
            patch_model(model)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        adapters = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        merged = model.merge_and_unload().eval()
        with torch.no_grad():
            return Outcome(
                {"merged": merged(ids).logits},
                {"adapters": torch.cat([g.flatten() for g in adapters.values()])},
                merged,
            )

    compare(scenario)


SENTENCES = ["The assert statement is a convenient way to insert debugging assertions.", "Names refer to objects."] * 4


@pytest.mark.parametrize("packing", [False, True])
def test_trl(packing, tiny_folder, tmp_path):  # noqa: F811
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    def scenario(patched: bool) -> Outcome:
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder, pad_token="!", eos_token="~")
        options = {"max_length": 32, "packing": packing, "bf16": False, "gradient_checkpointing": False}
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32),
            args=trl.SFTConfig(output_dir=str(tmp_path), **ARGUMENTS | options),
            train_dataset=datasets.Dataset.from_dict({"text": SENTENCES}),
            processing_class=tokenizer,
            callbacks=[GeoScaleCallback()] if patched else [],
        )
        return trained(trainer, patched)

    compare(scenario)


def test_torchao():
    """FP8 linear layers under FP8 attention, emulated where there is no GPU."""
    float8 = pytest.importorskip("torchao.float8")
    config = float8.Float8LinearConfig(emulate=True)

    def scenario(patched: bool) -> Outcome:
        model, ids = tiny_model("llama"), tokens(2, 24)
        model = float8.convert_to_float8_training(
            model, config=config, module_filter_fn=lambda module, name: "self_attn" in name
        )
        if patched:
            patch_model(model)
        model.train()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        return Outcome({"logits": out.logits.detach()}, gradients(model), model)

    compare(scenario)


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def test_liger(monkeypatch):
    """Its rotation and norms around a patched attention; its kernel of norms needs a GPU, and PyTorch stands in without one."""
    liger = pytest.importorskip("liger_kernel.transformers")
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb
    )  # Liger has no undo
    if not torch.cuda.is_available():
        monkeypatch.setattr(liger.LigerRMSNorm, "forward", rms_norm)

    def scenario(patched: bool) -> Outcome:
        model, ids = tiny_model("llama"), tokens(2, 24)
        liger.apply_liger_kernel_to_llama(swiglu=False, fused_linear_cross_entropy=False, model=model)
        assert "Liger" in repr(model.model.layers[0].input_layernorm)
        if patched:
            patch_model(model)
        model.train()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        return Outcome({"logits": out.logits.detach()}, gradients(model), model)

    compare(scenario)

"""What the worker processes run under DeepSpeed ZeRO-3. DeepSpeed is imported in them alone: it replaces functions of torch."""

import gc
import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType
from accelerate.state import AcceleratorState
from torch import nn
from transformers import AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM

from hf_geoscale import geometry_report, patch_model, refresh_scales, unpatch_model
from hf_geoscale.errors import UnsupportedModelError
from hf_geoscale.integrations import geoscale_layers

from ..conftest import SHAPE, tiny_model
from .scenarios import counting_measurements, local_batch, mean, scales_of
from .stack_scenarios import accelerated_steps

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,  # 1 unless said
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def deepspeed_on(device: str):
    """The package, which on the CPU builds none of its extensions."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if device == "cpu":
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


@contextmanager
def prepared(model: nn.Module, device: str, **zero):
    """DeepSpeed's engine around the model, with AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    config = CONFIG | {"zero_optimization": CONFIG["zero_optimization"] | zero}
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    engine, *_ = deepspeed_on(device).initialize(model=model, optimizer=optimizer, config=config)
    try:
        yield engine
    finally:
        engine.destroy()
        gc.collect()


def whole_weights(model: nn.Module, device: str) -> dict[str, torch.Tensor]:
    """The model's weights, gathered, on the CPU."""
    with deepspeed_on(device).zero.GatheredParameters(list(model.parameters())):
        return {name: p.detach().cpu().clone() for name, p in model.state_dict().items()}


def build(lora: bool = False) -> nn.Module:
    """A patched tiny Llama; with adapters that are not zero, in the attention alone."""
    model = patch_model(tiny_model("llama").train())
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).train()
    return model


def true_scales(model: nn.Module, device: str, **options) -> list[torch.Tensor]:
    """Scales of a model of one process with the same weights."""
    plain = build(**options)
    plain.load_state_dict(whole_weights(model, device))
    plain.to(device)
    refresh_scales(plain)
    return scales_of(plain)


def still_whole(model: nn.Module) -> list[str]:
    """Names of the parameters that are not in parts now."""
    return [name for name, p in model.named_parameters() if p.ds_status.name != "NOT_AVAILABLE"]


def watch_backward(model: nn.Module, found: list[str]) -> None:
    """Note what of the last layer is still whole when a backward reaches the attention of the first."""
    first, *_, last = [module for module in model.modules() if hasattr(module, "self_attn")]

    def look(_, args, output) -> None:
        if output[0].requires_grad:
            output[0].register_hook(lambda _: found.extend(still_whole(last)))

    first.self_attn.register_forward_hook(look)


def train(device: str, steps: int = 4, checkpointing: bool = False, lora: bool = False, **zero) -> dict:
    """A few AdamW steps: losses, scales used and due, layers measured, and what stays whole too long."""
    deepspeed_on(device)
    model = build(lora)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = local_batch(device)
    found: dict = {"losses": [], "scales": [], "due": [], "measured": [], "whole": []}
    watch_backward(model, found["whole"])
    with prepared(model, device, **zero) as engine:
        for _ in range(steps):
            found["due"].append(true_scales(model, device, lora=lora))
            with counting_measurements() as measured:
                loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
                engine.backward(loss)
            found["whole"] += still_whole(model)
            engine.step()
            found["losses"].append(mean(loss))
            found["scales"].append(scales_of(model))
            found["measured"].append((measured[0], measured[1]))
        found["calls"] = [layer.calls for layer in geoscale_layers(model)]
    return found


def alone(device: str, steps: int = 4, lora: bool = False) -> list[float]:
    """Losses of the same training by one process without DeepSpeed."""
    model, batch = build(lora).to(device), local_batch(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _write_gathered(model, device):
    with deepspeed_on(device).zero.GatheredParameters(list(model.parameters()), modifier_rank=0), torch.no_grad():
        if dist.get_rank() == 0:
            for parameter in model.parameters():
                parameter.mul_(2)


def _write_partition(model, device):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.ds_tensor.mul_(0.5)


def _write_unseen(model, device):
    for parameter in model.parameters():
        parameter.ds_tensor.data.mul_(2)


def _write_unseen_and_refresh(model, device):
    _write_unseen(model, device)
    refresh_scales(model)


WRITES = {
    "nothing": (lambda model, device: None, 0),
    "gathered": (_write_gathered, 1),
    "partition": (_write_partition, 1),
    "unseen, then refresh_scales": (_write_unseen_and_refresh, 1),
}
"""And the measurements of each layer that they are to cause in training."""


def writes(device: str) -> dict:
    """After each way to write: whether the scales are fresh, and measurements of the first layer; then in evaluation."""
    model, batch = build(), local_batch(device)
    found = {}
    with prepared(model, device) as engine:

        def after(write) -> tuple[bool, int]:
            write(model, device)
            if device != "cpu":  # DeepSpeed gathers on a stream of its own, which does not wait for this one's writes
                torch.cuda.synchronize()
            with counting_measurements() as measured, torch.no_grad():
                engine(input_ids=batch)
            return all(map(torch.equal, scales_of(model), true_scales(model, device))), measured[0]

        engine(input_ids=batch)
        for name, (write, _) in WRITES.items():
            found[name] = after(write)
        engine.eval()
        found["evaluation"] = after(WRITES["nothing"][0])
        found["evaluation again"] = after(WRITES["nothing"][0])
        found["unseen, in evaluation"] = after(_write_unseen)
        found["row"] = geometry_report(model).rows[0]["sigma_upper"], len(geometry_report(model).rows[0]["q_bound"])
    return found


def loaded_in_parts(device: str, folder: str) -> dict:
    """from_pretrained under ZeRO-3 leaves no whole weight anywhere; then patched, prepared and run."""
    from transformers.integrations import deepspeed as integration

    deepspeed_on(device)
    kept = integration.HfDeepSpeedConfig(CONFIG)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder).train()
    finally:
        integration.unset_hf_deepspeed_config()
        del kept
    absent = still_whole(model) == []
    patch_model(model)
    before = [layer.geometry is not None for layer in geoscale_layers(model)]
    with prepared(model, device) as engine:
        engine(input_ids=local_batch(device))
        fresh = all(map(torch.equal, scales_of(model), true_scales(model, device)))
    return {"absent": absent, "measured while patching": any(before), "fresh": fresh}


def unpatched(device: str) -> dict:
    """Two steps, unpatch, evaluate, two steps and patch again: losses, and the error of the logits against one process's."""
    model, batch = build(), local_batch(device)
    losses = []
    with prepared(model, device) as engine:

        def steps():
            for _ in range(2):
                loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
                engine.backward(loss)
                engine.step()
                losses.append(mean(loss))

        steps()
        unpatch_model(model)
        plain = tiny_model("llama")
        plain.load_state_dict(whole_weights(model, device))
        with torch.no_grad():
            expected, got = plain.to(device)(batch).logits, engine(batch).logits
        steps()
        patch_model(model)
        steps()
        fresh = [layer.calls for layer in geoscale_layers(model)]
    return {"losses": losses, "error": float((got - expected).abs().max()), "calls": fresh}


def prepared_by_accelerate(device: str) -> dict:
    """A raw Accelerate loop with its DeepSpeed plugin and BF16: losses, scales and measurements."""
    deepspeed_on(device)
    plugin = DeepSpeedPlugin(zero_stage=3, zero3_init_flag=False, gradient_clipping=1.0)
    plugin.deepspeed_config |= {"zero_force_ds_cpu_optimizer": False, "train_micro_batch_size_per_gpu": 2}
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16", deepspeed_plugin=plugin)
    if device == "cpu":  # accelerate uses DeepSpeed on accelerators alone; its code for it runs on the CPU too
        accelerator.state.deepspeed_plugins = {"default": plugin}
        accelerator.state.distributed_type = DistributedType.DEEPSPEED
        plugin.set_mixed_precision("bf16")
        plugin.select(_from_accelerator_state=True)
    try:
        model, batch = build(), local_batch(device)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
        accelerator.state.distributed_type = DistributedType.DEEPSPEED  # reset in there on the CPU
        found = accelerated_steps(accelerator, model, optimizer, batch, use_cache=False)
        found["engine"] = type(model).__name__
        model.destroy()
        return found
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def in_parts(device: str) -> nn.Module:
    """A tiny Llama that DeepSpeed has partitioned and not prepared."""
    model = tiny_model("llama")
    deepspeed_on(device).zero.Init(module=model, config_dict_or_path=CONFIG)
    return model


def refusal(device: str, what: str) -> str:
    """The message of UnsupportedModelError."""
    batch = local_batch(device)
    try:
        if what == "patched late":
            model = tiny_model("llama")
            with prepared(model, device) as engine:
                patch_model(model)
                engine(input_ids=batch)
        elif what == "never prepared":
            model = patch_model(in_parts(device))
            geoscale_layers(model)[0].refresh_if_stale()
        elif what == "rank-aware":
            patch_model(in_parts(device), bound="rank_aware", quantize_logits=True)
        else:
            model = patch_model(Olmo2ForCausalLM(Olmo2Config(**SHAPE)))
            with prepared(model, device) as engine:
                engine(input_ids=batch)
    except UnsupportedModelError as error:
        return str(error)
    return "no error"

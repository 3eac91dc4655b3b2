"""What the worker processes run through accelerate and the Trainer."""

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments

from hf_geoscale import GeoScaleCallback, patch_model, refresh_scales
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.sharding import is_shard

from ..conftest import tiny_model, tokens
from .scenarios import LENGTH, counting_measurements, local_batch, mean, scales_of, true_scales


def accelerated_steps(accelerator, model, optimizer, batch, **inputs) -> dict:
    """Losses, scales and counts of measurements of three steps."""
    found: dict = {"losses": [], "scales": [], "measured": []}
    for _ in range(3):
        with counting_measurements() as measured:
            loss = model(input_ids=batch, labels=batch, **inputs).loss
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        refresh_scales(model)
        found["losses"].append(mean(loss))
        found["scales"].append(scales_of(model))
        found["measured"].append(measured[0])
    return found


def accelerate_fsdp2(device: str) -> dict:
    """A raw Accelerate loop with its FSDP2 plugin, mixed precision and activation checkpointing; scales and losses."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        activation_checkpointing=True,
        cpu_ram_efficient_loading=True,
    )
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16", fsdp_plugin=plugin)
    if device == "cpu":  # accelerate shards on accelerators alone; its code for it runs on the CPU too
        accelerator.state.fsdp_plugin, accelerator.state.distributed_type = plugin, DistributedType.FSDP
        plugin.set_mixed_precision("bf16")
    try:
        # With cpu_ram_efficient_loading only rank 0 holds the weights, the others' are replaced.
        model = patch_model(tiny_model("llama", seed=dist.get_rank()).to(device).train())
        model.config.use_cache = False  # a recomputed forward would append to the cache again
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        batch = local_batch(device)
        found = accelerated_steps(accelerator, model, optimizer, batch)
        found["sharded"] = all(is_shard(p) for p in model.parameters())
        return found
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def trainer(device: str, folder: str) -> dict:
    """Transformers' Trainer under DDP, with the callback, gradient checkpointing and accumulation."""
    data = [{"input_ids": row, "labels": row} for row in tokens(16, LENGTH)]
    arguments = TrainingArguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=device == "cpu",
    )
    model = tiny_model("llama")
    run = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[GeoScaleCallback()])
    try:
        run.train()
        logs = [entry for entry in run.state.log_history if "loss" in entry]
        return {
            "wrapped": type(run.model_wrapped).__name__,
            "losses": [entry["loss"] for entry in logs],
            "overflows": [entry["geoscale/overflows"] for entry in logs],
            "scales": scales_of(model),
            "fresh": all(map(torch.equal, scales_of(model), true_scales(model, device))),
            "calls": [layer.calls for layer in geoscale_layers(model)],
        }
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)

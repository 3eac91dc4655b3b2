"""What the worker processes run on FSDP2's shards: patching, writing, resuming, refusals."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from hf_geoscale import GeoScaleCallback, geometry_report, patch_model, refresh_scales
from hf_geoscale.errors import UnsupportedModelError
from hf_geoscale.integrations import geoscale_layers

from ..conftest import tiny_model
from .scenarios import (
    counting_measurements,
    full_weights,
    local_batch,
    mean,
    mesh,
    reshard_all,
    scales_of,
    shard,
    true_scales,
)


def same_scales(model: nn.Module, device: str) -> bool:
    """Whether the next forward uses the scales of the weights as they are now."""
    expected = true_scales(model, device)
    batch = local_batch(device)
    with torch.no_grad():
        model(input_ids=batch)
    return all(torch.equal(used, true) for used, true in zip(scales_of(model), expected, strict=True))


def order(device: str, when: str) -> dict:
    """Patch before or after sharding, or before the weights exist; then one forward."""
    weights = tiny_model("llama").state_dict()
    model = tiny_model("llama", seed=2).to("meta" if when == "meta" else device)
    if when != "after":
        patch_model(model)
    shard(model, device)
    if when == "meta":
        model.to_empty(device=device)
        for name, buffer in tiny_model("llama").model.rotary_emb.named_buffers():
            setattr(model.model.rotary_emb, name, buffer.to(device))
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, {n: p.to(device) for n, p in weights.items()}, options=options)
    if when == "after":
        patch_model(model)
    measured_while_patching = [layer.geometry is not None for layer in geoscale_layers(model)]
    rows = geometry_report(model).rows
    return {
        "fresh": same_scales(model, device),
        "measured while patching": any(measured_while_patching),
        "sigma_upper": rows[0]["sigma_upper"],
        "q_bound": geometry_report(model).rows[0]["q_bound"],
        "σ upper in the table": geometry_report(model).to_markdown().splitlines()[2].split(" | ")[2],
    }


def _load(model, device):
    model.load_state_dict({n: p * 2 for n, p in model.state_dict().items()})


def _assign(model, device):
    model.load_state_dict({n: (p * 2).detach() for n, p in model.state_dict().items()}, assign=True)


def _load_full(model, device):
    state = {n: p.to(device) * 2 for n, p in full_weights(model).items()}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def _average(model, device):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.lerp_(torch.zeros_like(parameter), 0.5)


def _local_write(model, device):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().mul_(2)


def _step(model, device):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.01, foreach=True).step()


def _write_unseen(model, device):
    for parameter in model.parameters():
        parameter.data.to_local().data.mul_(2)
    refresh_scales(model)


def _write_and_gather(model, device):
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.parameters():
                parameter.mul_(2)
            layer.unshard()


WRITES = {
    "load_state_dict": _load,
    "load_state_dict(assign=True)": _assign,
    "set_model_state_dict": _load_full,
    "averaging in place": _average,
    "local write": _local_write,
    "foreach optimizer step": _step,
    "unseen write and refresh_scales": _write_unseen,
    "write, then unshard by hand": _write_and_gather,
}


def writes(device: str, reshard: bool) -> dict[str, tuple[bool, int, int]]:
    """After each way to write: are the scales fresh, how often was each of 2 layers measured, and again without a write."""
    model = patch_model(tiny_model("llama").to(device))
    shard(model, device, reshard_after_forward=reshard)
    same_scales(model, device)
    found = {}
    for name, write in WRITES.items():
        reshard_all(model)
        write(model, device)
        with counting_measurements() as first:
            model(input_ids=local_batch(device))
        measured = first[0]
        used = scales_of(model)
        reshard_all(model)
        fresh = all(torch.equal(a, b) for a, b in zip(used, true_scales(model, device), strict=True))
        with counting_measurements() as again:
            model(input_ids=local_batch(device)).logits.sum().backward()
            model(input_ids=local_batch(device))
        found[name] = (fresh, measured, again[0])
        model.zero_grad()
    return found


def refusal(device: str, what: str) -> str:
    """The message of UnsupportedModelError."""
    model = tiny_model("llama").to(device)
    block = model.model.layers[1]
    try:
        if what == "projection":
            patch_model(model)
            fully_shard(block.self_attn.q_proj, mesh=mesh(device))
            shard(model, device)
        elif what == "name alone":
            model.config._attn_implementation = "geoscale"
            shard(model, device)
        elif what == "tensor parallel":
            parallelize_module(block.self_attn.q_proj, mesh(device), ColwiseParallel())
            patch_model(model)
        else:
            patch_model(model)
            flat = what == "FSDP1, flat"
            model = FullyShardedDataParallel(model, device_id=dist.get_rank(), use_orig_params=not flat)
        model(input_ids=local_batch(device))
    except UnsupportedModelError as error:
        return str(error)
    return "no error"


def scheduled(device: str, strategy: str, lr: float, steps: int = 5) -> dict:
    """The callback with every_n_steps=3: layers measured a step, whether scales cover the weights, and the scales."""
    callback = GeoScaleCallback(every_n_steps=3)
    model = tiny_model("llama").to(device).train()
    callback.on_init_end(None, None, None, model=model)
    wrapped = shard(model, device) if strategy == "fsdp2" else model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=lr)
    batch = local_batch(device)
    callback.on_train_begin(None, None, None, model=wrapped)
    found: dict = {"measured": [], "covered": [], "scales": []}
    headroom = callback.config.headroom
    for _ in range(steps):
        with counting_measurements() as measured:
            wrapped(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            callback.on_optimizer_step(None, None, None, model=wrapped, optimizer=optimizer)
            callback.on_step_end(None, None, None, model=wrapped)
            optimizer.zero_grad()
        found["measured"].append(measured[0])
        found["scales"].append(scales_of(model))
        pairs = zip(scales_of(model), true_scales(model, device), strict=True)
        found["covered"].append(all(bool((used <= true).all()) for used, true in pairs))
    found["headroom"] = headroom
    return found


def resume(device: str, folder: str) -> tuple[list[float], list[float]]:
    """Losses of steps 3 and 4, uninterrupted and from a checkpoint of torch.distributed.checkpoint taken after step 2."""
    batch = local_batch(device)

    def fresh(seed):
        model = shard(patch_model(tiny_model("llama", seed=seed).to(device).train()), device)
        return model, torch.optim.AdamW(model.parameters(), lr=3e-3)

    def steps(model, optimizer):
        losses = []
        for _ in range(2):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(mean(loss))
        return losses

    model, optimizer = fresh(0)
    steps(model, optimizer)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(state, checkpoint_id=folder)
    expected = steps(model, optimizer)
    model, optimizer = fresh(3)
    steps(model, optimizer)  # other weights, scales of theirs
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return expected, steps(model, optimizer)

"""What the worker processes run. Each function takes the device first and returns plain tensors and numbers."""

from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hf_geoscale import GeoScaleCallback, geometry_report, patch_model, refresh_scales
from hf_geoscale.errors import UnsupportedModelError
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.layer import GeoScaleLayer
from hf_geoscale.integrations.sharding import is_shard

from ..conftest import tiny_model, tokens

BATCH, LENGTH = 4, 24


def local_batch(device: str) -> torch.Tensor:
    """This process's rows of the batch that all processes share."""
    return tokens(BATCH, LENGTH)[dist.get_rank() :: dist.get_world_size()].to(device)


def mesh(device: str):
    return init_device_mesh(device, (dist.get_world_size(),))


def shard(model: nn.Module, device: str, **options) -> nn.Module:
    """FSDP2 on each decoder layer and on the rest."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh(device), **options)
    return fully_shard(model, mesh=mesh(device), **options)


def build(device: str, strategy: str, patched: bool = True, checkpointing: bool = False, bf16: bool = False):
    model = tiny_model("llama").to(device).train()
    model.config.use_cache = False
    if patched:
        patch_model(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    if strategy == "fsdp2":
        return model, shard(model, device, mp_policy=policy)
    if strategy == "ddp":
        return model, DistributedDataParallel(model)
    return model, model


def scales_of(model: nn.Module) -> list[torch.Tensor]:
    """Scales in use, a tensor a layer."""
    used = [layer.scaling.scales for layer in geoscale_layers(model)]
    return [torch.cat([s.q, s.k, s.v]).cpu() for s in used]


@contextmanager
def counting_measurements():
    """Layers measured, by number, and the most layers found whole at a measurement of a sharded one."""
    seen, original = Counter(), GeoScaleLayer.measure

    def spy(self):
        seen[self.site.layer] += 1
        blocks = [m for m in self.enclosing[0].modules() if hasattr(m, "self_attn")]
        whole = sum(not any(is_shard(p) for p in block.parameters()) for block in blocks)
        seen["most whole"] = max(seen["most whole"], whole)
        return original(self)

    GeoScaleLayer.measure = spy
    try:
        yield seen
    finally:
        GeoScaleLayer.measure = original


def mean(loss: torch.Tensor) -> float:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()


def train(device: str, strategy: str, steps: int = 4, **options) -> dict:
    """A few AdamW steps: losses, scales and measurements of every step, and the collectives of one."""
    model, wrapped = build(device, strategy, **options)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=3e-3)
    batch = local_batch(device)
    found: dict = {"losses": [], "scales": [], "measured": []}
    with counting_measurements() as measured:
        for _ in range(steps):
            measured.clear()
            communication = CommDebugMode()
            with communication:
                loss = wrapped(input_ids=batch, labels=batch).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found["losses"].append(mean(loss))
            found["scales"].append(scales_of(model))
            found["measured"].append(dict(measured))
    found["collectives"] = {str(name): count for name, count in communication.get_comm_counts().items()}
    found["calls"] = [layer.calls for layer in geoscale_layers(model)]
    return found


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights, whole, on the CPU."""
    state = model.state_dict()
    return {name: (p.full_tensor() if is_shard(p) else p).cpu().clone() for name, p in state.items()}


def reshard_all(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def true_scales(model: nn.Module, device: str) -> list[torch.Tensor]:
    """Scales of an unsharded model with the same weights."""
    plain = tiny_model("llama", seed=1)
    plain.load_state_dict(full_weights(model))
    return scales_of(patch_model(plain.to(device)))


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
        found: dict = {"losses": [], "scales": [], "measured": []}
        for _ in range(3):
            with counting_measurements() as measured:
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            refresh_scales(model)
            found["losses"].append(mean(loss))
            found["scales"].append(scales_of(model))
            found["measured"].append(measured[0])
        found["sharded"] = all(is_shard(p) for p in model.parameters())
        return found
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)

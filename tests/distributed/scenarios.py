"""What the worker processes run. Each function takes the device first and returns plain tensors and numbers."""

from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from hf_geoscale import patch_model
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
    seen, original = Counter(), GeoScaleLayer.read

    def spy(self):
        seen[self.site.layer] += 1
        blocks = [m for m in next(self.enclosing).modules() if hasattr(m, "self_attn")]
        whole = sum(not any(is_shard(p) for p in block.parameters()) for block in blocks)
        seen["most whole"] = max(seen["most whole"], whole)
        return original(self)

    GeoScaleLayer.read = spy
    try:
        yield seen
    finally:
        GeoScaleLayer.read = original


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

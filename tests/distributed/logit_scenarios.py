"""What the worker processes run of logit control: QuacK and QK-Clip on shards and replicas."""

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from hf_geoscale import QKClip, QuacK
from hf_geoscale.integrations.sharding import is_shard
from hf_geoscale.stability import HeadSlices, LogitWeights
from hf_geoscale.stability.quack import INITIAL_REACH

from ..conftest import SHAPE, tiny_model
from .scenarios import full_weights, local_batch, mean, mesh, shard

LEARNING_RATE = 3e-2
THRESHOLD = 0.05


def odd_llama(seed: int = 0) -> nn.Module:
    """Three heads, one key head: two processes cut within heads."""
    torch.manual_seed(seed)
    shape = SHAPE | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48, "head_dim": 16}
    return LlamaForCausalLM(LlamaConfig(**shape)).train()


def build(device: str, strategy: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """The model, and what runs it."""
    model = odd_llama(seed).to(device)
    if strategy == "fsdp2":
        return model, shard(model, device)
    return model, DistributedDataParallel(model) if strategy == "ddp" else model


def steps(wrapped: nn.Module, optimizer, device: str, count: int, clip: QKClip | None = None) -> list[float]:
    losses, batch = [], local_batch(device)
    for _ in range(count):
        loss = wrapped(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss))
        if clip is not None:
            clip.step()
    return losses


def control(device: str, strategy: str) -> dict:
    """Four steps under QuacK: losses, weights, factors, and the collectives of one step's factors."""
    model, wrapped = build(device, strategy)
    optimizer = QuacK(AdamW(model.parameters(), lr=LEARNING_RATE), model)
    losses = steps(wrapped, optimizer, device, 4)
    communication = CommDebugMode()
    with communication:
        factors = optimizer.factors()
    return {
        "losses": losses,
        "weights": full_weights(model),
        "factors": factors.cpu(),
        "collectives": list(communication.get_comm_counts().values()),
    }


def resume(device: str, folder: str) -> dict:
    """Two steps, a distributed checkpoint, two steps; and the last two again by a fresh model that loaded it."""
    model, wrapped = build(device, "fsdp2")
    optimizer = QuacK(AdamW(model.parameters(), lr=LEARNING_RATE), model)
    steps(wrapped, optimizer, device, 2)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(state, checkpoint_id=folder)
    expected = steps(wrapped, optimizer, device, 2)
    again, wrapped = build(device, "fsdp2", seed=7)
    loaded = QuacK(AdamW(again.parameters(), lr=LEARNING_RATE), again)
    state = dict(zip(("model", "optimizer"), get_state_dict(again, loaded), strict=True))
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(again, loaded, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    kept = [o.param_groups[0][INITIAL_REACH] for o in (optimizer, loaded)]
    return {"kept": kept, "expected": expected, "found": steps(wrapped, loaded, device, 2)}


def clip(device: str, strategy: str) -> dict:
    """Three steps with QK-Clip: every process saw other tokens."""
    model, wrapped = build(device, strategy)
    clipping = QKClip(model, threshold=THRESHOLD)
    losses = steps(wrapped, torch.optim.SGD(model.parameters(), lr=0.5), device, 3, clipping)
    return {"losses": losses, "weights": full_weights(model), "clipped": clipping.clipped_heads}


def uneven(device: str) -> dict:
    """Norms and a multiplication of five rows in two slices, three and two of them on either process."""
    linear = nn.Linear(4, 5, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(20.0).view(5, 4))
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach().to(device), mesh(device), [Shard(0)]))
    weight = HeadSlices(linear, "weight", torch.tensor([0, 0, 1, 1, -1]), 0, "weight")
    slices = LogitWeights([weight], [], ["a", "b"], [(0, (1,)), (1, (0,))])
    norms = slices.norms()
    slices.multiply(torch.tensor([2.0, 3.0], device=device))
    return {"norms": norms.cpu(), "weight": linear.weight.detach().full_tensor().cpu()}


def refusals(device: str) -> dict:
    """Messages about tensor parallelism, and about certificates of shards."""
    found = {}
    model = tiny_model("llama").to(device)
    projections = {f"model.layers.0.self_attn.{name}": RowwiseParallel() for name in ("q_proj", "k_proj")}
    parallelize_module(model, mesh(device), projections)
    optimizer = QuacK(AdamW(model.parameters()), model)
    model, _ = build(device, "fsdp2")
    for name, attempt in (
        ("tensor parallelism", optimizer.factors),
        ("certificates", lambda: QKClip(model, source="certificate")),
    ):
        try:
            attempt()
        except ValueError as error:
            found[name] = str(error)
    return found


def prepared_by_accelerate(device: str) -> dict:
    """accelerate shards the model after QuacK was made, and replaces its parameters in the groups."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(cpu=device == "cpu", fsdp_plugin=plugin)
    if device == "cpu":  # accelerate shards on accelerators alone; its code for it runs on the CPU too
        accelerator.state.fsdp_plugin, accelerator.state.distributed_type = plugin, DistributedType.FSDP
    try:
        model = odd_llama().to(device)
        model, optimizer = accelerator.prepare(model, QuacK(AdamW(model.parameters(), lr=LEARNING_RATE), model))
        losses, batch = [], local_batch(device)
        for _ in range(4):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(mean(loss))
        sharded = all(is_shard(p) for p in model.parameters())
        return {"losses": losses, "sharded": sharded, "factors": optimizer.optimizer.factors().cpu()}
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)

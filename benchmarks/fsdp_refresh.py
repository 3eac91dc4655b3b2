"""What certificates of weights sharded by FSDP2 cost: `torchrun --nproc_per_node 2 benchmarks/fsdp_refresh.py`.

Decoder layers of a model's shape with random weights, FSDP2 on each, forwards without gradients on a few tokens. A forward that
measures every layer is compared with one that measures none: the difference is the refresh (medians of five after a warm-up,
slowest process), and of the peaks of allocated memory the extra memory. Beside it stand one gathered layer and its q, k and v
weights in float64, as the certificates read them. On GPUs with NCCL, else on the CPU with gloo (where no memory is measured).
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from hf_geoscale import patch_model, refresh_scales
from hf_geoscale.integrations import geoscale_layers

# name: width, intermediate width, query heads, key/value heads
SHAPES = {
    "SmolLM2-135M": (576, 1536, 9, 3),
    "Llama-3.2-1B": (2048, 8192, 32, 8),
    "Llama-3-8B": (4096, 14336, 32, 8),
}
LAYERS, TOKENS, REPEATS = 4, 128, 5
MIB = 2**20

COLUMNS = (
    *("shape", "processes", "device", "torch", "refresh, ms a layer", "forward, ms a layer"),
    *("extra peak, MiB", "one layer in BF16, MiB", "its q, k, v in float64, MiB"),
)


def synchronize(device: str) -> None:
    """Until every process has finished what it launched."""
    if device == "cuda":
        torch.cuda.synchronize()
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def build(shape: str, device: str) -> LlamaForCausalLM:
    width, intermediate, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=LAYERS,
        vocab_size=256,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model = patch_model(model)  # outside the context, which would also move tensors made with a generator of the CPU
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


@torch.no_grad()
def forward(model: LlamaForCausalLM, device: str, refresh: bool) -> tuple[float, int]:
    """Milliseconds and peak bytes of one forward, with every layer measured or none."""
    if refresh:
        refresh_scales(model)
    tokens = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    started = time.perf_counter()
    model(input_ids=tokens)
    synchronize(device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return (time.perf_counter() - started) * 1e3, peak


def check_agreement(model: LlamaForCausalLM, device: str) -> None:
    """Raise unless every process has the same scales, bit for bit."""
    scales = [torch.cat([s.q, s.k, s.v]) for s in (x.scaling.scales for x in geoscale_layers(model))]
    mine = torch.cat(scales).to(device)
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    apart = [float((other / mine - 1).abs().max()) for other in others]
    if not all(torch.equal(other, mine) for other in others):
        raise RuntimeError(f"the processes disagree about the scales: largest relative differences {apart}")


def row(shape: str, device: str) -> str:
    model = build(shape, device)
    runs: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    for _ in range(REPEATS + 1):
        for refresh, found in runs.items():
            found.append(forward(model, device, refresh))
    medians = {refresh: statistics.median(ms for ms, _ in found[1:]) for refresh, found in runs.items()}
    peaks = {refresh: max(peak for _, peak in found[1:]) for refresh, found in runs.items()}
    figures = [medians[True] - medians[False], medians[False], peaks[True] - peaks[False]]
    worst = torch.tensor(figures, dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    refresh, plain, extra = worst.tolist()
    check_agreement(model, device)
    layer = model.model.layers[0]
    attention = layer.self_attn
    qkv = sum(getattr(attention, f"{name}_proj").weight.numel() for name in "qkv")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, 1 thread"
    cells = [
        shape,
        str(dist.get_world_size()),
        name,
        torch.__version__,
        f"{refresh / LAYERS:.2f}",
        f"{plain / LAYERS:.2f}",
    ]
    cells.append(f"{extra / MIB:.1f}" if device == "cuda" else "–")
    cells += [f"{2 * sum(p.numel() for p in layer.parameters()) / MIB:.1f}", f"{8 * qkv / MIB:.1f}"]
    return f"| {' | '.join(cells)} |\n"


@record  # so that torchrun prints the traceback of the process that failed first
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--output", type=Path, help="Markdown file to append a row per shape to; default: print only")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        dist.init_process_group("nccl", device_id=own)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    rows = []
    for shape in arguments.shapes:
        rows.append(row(shape, device))
        if dist.get_rank() == 0:
            print(rows[-1], end="", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    if dist.get_rank() == 0 and arguments.output:
        header = (
            f"Generated by `torchrun --nproc_per_node N benchmarks/fsdp_refresh.py`: {LAYERS} Llama layers, FSDP2 on each, "
            f"random weights, {TOKENS} tokens,\nmedians of {REPEATS}, slowest process.\n\n"
            f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        )
        text = arguments.output.read_text() if arguments.output.exists() else header
        arguments.output.write_text(text + "".join(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

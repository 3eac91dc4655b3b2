"""Cost of `refresh_scales` for a model's shape with random weights: `python benchmarks/refresh_cost.py`.

The model has all its attention layers and next to no feed-forward layers or vocabulary. Device time is what the refresh keeps the
device busy: the host is let run ahead first, so that no launch is waited for; where the device's queue is too short for that, it is
marked ≤. Host time is until the call returns, no waiting for the device. Both are p50 [p20, p80] of the repetitions,
warm-started as in training. The share is device time over the time of a training step: given by --step-ms, else assumed to be 6
operations a parameter and token at STEP_SPEED.

Before that, a gate: every certificate of the first layer is compared with σ from float64 eigenvalues, and the run fails if one lies
below. "Looseness" is the largest ratio of a certificate of that layer to the one that float64 arithmetic gives.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_geoscale import patch_model, refresh_scales
from hf_geoscale.geometry import gram, measure_layer
from hf_geoscale.geometry.batch import arithmetic_of
from hf_geoscale.integrations import geoscale_layers

STEP_TOKENS, STEP_SPEED = 8192, 400e12
"""An assumed training step: tokens, and operations a second that BF16 training reaches on an H100."""

REPETITIONS = 15

HEAD_START = 5 * 10**8
"""Clock cycles the device is kept busy while the host queues a refresh: about 0.3 s on an H100."""

# name: width, head dimension, query heads, key/value heads, layers, parameters
SHAPES = {
    "SmolLM2-135M": (576, 64, 9, 3, 30, 0.135e9),
    "Llama-3.2-1B": (2048, 64, 32, 8, 16, 1.24e9),
    "GPT-2 XL": (1600, 64, 25, 25, 48, 1.56e9),
    "Mistral-7B, Llama-3-8B": (4096, 128, 32, 8, 32, 7.25e9),
    "Llama-2-13B": (5120, 128, 40, 40, 40, 13.0e9),
    "Llama-2-70B": (8192, 128, 64, 8, 80, 69.0e9),
}

COLUMNS = (
    *("shape", "weights", "arithmetic", "q, k, v weights, GB", "device, ms", "host, ms", "extra peak memory, MiB"),
    *("looseness", "step, ms", "share of the step"),
)


def build(shape: str, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A patched model of Llama's attention layers, weights and gains random (seed 0), in training mode."""
    width, dim, heads, kv_heads, layers, _ = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config).train()
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight.add_(0.1 * torch.randn_like(block.input_layernorm.weight))
    return patch_model(model)


@torch.no_grad()
def gate(model: LlamaForCausalLM) -> float:
    """Looseness of the first layer's certificates; raises RuntimeError if one is below √d·σ of its weights."""
    layer = geoscale_layers(model)[0]
    projections = layer.site.projections()
    double = measure_layer(*projections, layer.site.softmax_scale, arithmetic="float64")
    worst = 0.0
    for name, projection in zip("qkv", projections, strict=True):
        bound = getattr(layer.geometry, f"{name}_bound")
        matrix = projection.matrix()
        sigma = torch.linalg.eigvalsh(gram(matrix))[:, -1].sqrt()
        if not bool((bound >= matrix.shape[-1] ** 0.5 * sigma).all()):
            raise RuntimeError(f"a certificate of {name} lies below the norm of its weights")
        worst = max(worst, float((bound / getattr(double, f"{name}_bound")).amax()))
    return worst


def measure(model: LlamaForCausalLM, head_start: int) -> tuple[list[float], list[float], int]:
    """Device and host milliseconds of each repetition, and the bytes a refresh needs at its peak beyond what is allocated.

    Without a GPU only host milliseconds. Device milliseconds are empty where the host did not finish within the head start.
    """
    on_device, on_host, peak = [], [], 0
    for _ in range(REPETITIONS):
        if on_gpu := torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if head_start:
                torch.cuda._sleep(head_start)
            start.record()
        started = time.perf_counter()
        refresh_scales(model)
        on_host.append((time.perf_counter() - started) * 1e3)
        if on_gpu:
            late = bool(head_start) and start.query()
            stop.record()
            torch.cuda.synchronize()
            if late:
                return [], on_host, peak
            on_device.append(start.elapsed_time(stop))
            peak = max(peak, torch.cuda.max_memory_allocated() - allocated)
    return on_device, on_host, peak


def spread(times: list[float]) -> str:
    fifths = statistics.quantiles(times, n=5)
    return f"{statistics.median(times):.2f} [{fifths[0]:.2f}, {fifths[3]:.2f}]"


def row(shape: str, dtype: torch.dtype, device: str, step_ms: float | None) -> str:
    gc.collect()  # the model before: modules and their hooks refer to each other
    model = build(shape, dtype, device)
    looseness = gate(model)
    for _ in range(4):
        refresh_scales(model)
    _, on_host, _ = measure(model, 0)
    on_device, _, peak = measure(model, HEAD_START)
    bound = "" if on_device else "≤ "
    if not on_device:
        on_device, _, peak = measure(model, 0)
    with torch.no_grad():
        projections = [layer.site.projections() for layer in geoscale_layers(model)]
    weights = sum(p.weight.numel() * p.weight.element_size() for maps in projections for p in maps)
    source = "given" if step_ms else "assumed"
    step_ms = step_ms or 6 * SHAPES[shape][5] * STEP_TOKENS / STEP_SPEED * 1e3
    cells = [shape, str(dtype).removeprefix("torch."), arithmetic_of(projections[0]), f"{weights / 1e9:.2f}"]
    cells += [bound + spread(on_device) if on_device else "–", spread(on_host)]
    cells += [f"{peak / 2**20:.0f}" if device == "cuda" else "–", f"{looseness:.4f}"]
    cells += [f"{step_ms:.0f} ({source})"]
    cells += [f"{bound}{statistics.median(on_device) / step_ms:.2%}" if on_device else "–"]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument(
        "--step-ms", type=float, nargs="+", help="milliseconds of a training step, one a shape, 0: assumed"
    )
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to; default: print only")
    arguments = parser.parse_args()
    steps = arguments.step_ms or [0.0] * len(arguments.shapes)
    if len(steps) != len(arguments.shapes):
        parser.error(f"--step-ms needs one number a shape: {len(arguments.shapes)} shapes, got {len(steps)} numbers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = [f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"]
    for shape, step_ms in zip(arguments.shapes, steps, strict=True):
        for dtype in arguments.dtypes:
            table.append(row(shape, getattr(torch, dtype), device, step_ms or None))
            print(table[-1], end="", flush=True)
    if arguments.output:
        header = (
            f"Generated by `python benchmarks/refresh_cost.py` on {name}, torch {torch.__version__}: `refresh_scales` of all "
            f"layers, random weights (seed 0), p50 [p20, p80] of {REPETITIONS}.\nAssumed steps: {STEP_TOKENS:,} tokens at "
            f"{STEP_SPEED / 1e12:.0f} TFLOP/s. Looseness: largest ratio to the certificate in float64 arithmetic.\n\n"
        )
        arguments.output.write_text(header + "".join(table))


if __name__ == "__main__":
    main()

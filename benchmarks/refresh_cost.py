"""Time of one refresh for a model's shape with random weights, on the device at hand: `python benchmarks/refresh_cost.py`.

Layers are refreshed one after the other, as in training; median of five refreshes after a warm-up, all layers counted.
"""

import statistics
import time

import torch

from hf_geoscale.geometry import Projection, measure_layer

# name: width, head dimension, query heads, key/value heads, layers
SHAPES = {
    "SmolLM2-135M": (576, 64, 9, 3, 30),
    "Llama-3.2-1B": (2048, 64, 32, 8, 16),
    "Llama-3-8B": (4096, 128, 32, 8, 32),
}


def refresh_seconds(width: int, dim: int, heads: int, kv_heads: int, layers: int, device: str) -> float:
    generator = torch.Generator(device).manual_seed(0)
    gain = torch.ones(width, device=device)
    weights = [
        torch.randn(h, dim, width, generator=generator, device=device) * width**-0.5
        for h in (heads, kv_heads, kv_heads)
    ]
    projections = [Projection(w, gain) for w in weights]
    vectors, times = None, []
    for _ in range(6):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(layers):
            vectors = measure_layer(*projections, dim**-0.5, vectors=vectors).vectors
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for model, shape in SHAPES.items():
        print(f"{model}: {refresh_seconds(*shape, device) * 1e3:.1f} ms a refresh ({name}, torch {torch.__version__})")

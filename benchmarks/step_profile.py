"""Where a training step's time and energy go: milliseconds by kernel (torch.profiler), joules by the card's own counter (NVML).

    python benchmarks/step_profile.py --length 32768 --layers 3

Steps as in `step.py`, refresh of our scales included, without its gate: run that first. Joules are those of the whole card over
some seconds of steps in a row, unprofiled; "–" without an NVIDIA driver.
"""

import argparse
import ctypes
import time
from collections.abc import Callable

import torch
from host import environment
from step_models import CONTENDERS, SHAPES, Contender, build, contend
from step_timing import make_optimizer, release, synchronize, train_step
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hf_geoscale import refresh_scales

WARMUP, PROFILED = 3, 2
"""Steps before the measurement, and under the profiler."""

SECONDS = 4.0
"""Of steps in a row, for the card's clock and the counter's resolution (a guess)."""


def energy_counter() -> Callable[[], float] | None:
    """Joules of the first GPU since the driver was loaded; None without one that counts them."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
        return None
    if nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)):
        return None

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    return read


def steps(contender: Contender, optimizer: torch.optim.Optimizer, ids: Tensor, count: int) -> float:
    """Seconds of some steps in a row, each with its refresh, waited for."""
    started = time.perf_counter()
    for _ in range(count):
        train_step(contender, optimizer, ids)
        if contender.ours:
            refresh_scales(contender.model)
    synchronize(ids.is_cuda)
    return time.perf_counter() - started


def kernels(contender: Contender, optimizer: torch.optim.Optimizer, ids: Tensor) -> list[tuple[float, float, str]]:
    """(milliseconds, calls, name) a step of every kernel, or on a CPU of every operation, longest first."""
    where = DeviceType.CUDA if ids.is_cuda else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ids.is_cuda else [])]
    with profile(activities=activities) as profiled:
        steps(contender, optimizer, ids, PROFILED)
    found = []
    for event in profiled.key_averages():
        spent = event.self_device_time_total if ids.is_cuda else event.self_cpu_time_total
        if event.device_type == where and spent > 0:
            found.append((spent / PROFILED / 1e3, event.count / PROFILED, event.key))
    return sorted(found, reverse=True)


def report(contender: Contender, optimizer: torch.optim.Optimizer, ids: Tensor, most: int, seconds: float) -> str:
    """Time and energy of a step, and its `most` longest kernels."""
    if contender.ours:
        refresh_scales(contender.model)  # another contender moved the shared weights
    steps(contender, optimizer, ids, WARMUP)
    one = steps(contender, optimizer, ids, 1)
    count, counter = max(1, round(seconds / one)), energy_counter() if ids.is_cuda else None
    before = counter() if counter else 0.0
    took = steps(contender, optimizer, ids, count)
    joules = (counter() - before) / count if counter else None
    energy = f"{joules:.1f} J, {joules * count / took:.0f} W" if joules is not None else "– J"
    lines = [f"{contender.name}: {took / count * 1e3:.2f} ms a step ({count} steps), {energy}"]
    lines += [
        f"{ms:10.3f} ms {n:7.1f} calls  {name[:110]}" for ms, n, name in kernels(contender, optimizer, ids)[:most]
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-3-8B", choices=list(SHAPES))
    parser.add_argument("--length", type=int, default=32768, help="tokens")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", default=["SDPA cuDNN", "hf_geoscale"], choices=list(CONTENDERS))
    parser.add_argument("--most", type=int, default=40, help="kernels to list; default %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of unprofiled steps; default %(default)s")
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(", ".join(f"{key} {value}" for key, value in environment("transformers").items()))
    print(f"{arguments.model}, {arguments.layers} layers, {arguments.length:,} tokens")
    base = build(arguments.model, arguments.layers, arguments.length, None, device)
    optimizer = make_optimizer(list(base.parameters()))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (1, arguments.length), generator=generator).to(device)
    for name in arguments.contenders:
        contender = contend(name, base, checkpointing=False)
        print("\n" + report(contender, optimizer, ids, arguments.most, arguments.seconds), flush=True)
        del contender
        release()


if __name__ == "__main__":
    main()

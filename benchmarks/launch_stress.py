"""Launches of random attention calls and lives of random models, for minutes, under a checker of memory.

    python benchmarks/launch_stress.py --minutes 5 --seed 1
    PYTHONMALLOC=debug python benchmarks/launch_stress.py --minutes 5
    LD_PRELOAD=libc_malloc_debug.so.0 MALLOC_CHECK_=3 MALLOC_PERTURB_=165 python benchmarks/launch_stress.py --minutes 5
    python benchmarks/launch_stress.py --plant freed_sizes          # must fail (planted_faults.py lists more)

Threads call `fp8_attention` with random shapes and options, forward and backward. One call in five runs again: repeated from a
plan, and launched by Triton's own Python. On a GPU outputs and gradients of the two must have the same bits. Without a GPU
launches are stubbed: no kernel runs, every pointer is read, and grids, functions and numbers must be equal. In between models are
patched, trained, compiled with torch's cache warm and cold, profiled and deleted; plans are dropped; the garbage collector runs.
The last line says what was done, or what went wrong first.
"""

import argparse
import gc
import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from host import environment
from planted_faults import PLANTS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_geoscale import fp8_attention, geometry_report, patch_model, refresh_scales, unpatch_model
from hf_geoscale.kernels import AttentionStatistics, launcher, replay

ROWS = 2048
"""Largest length of a sequence; without a GPU an eighth of it."""

LENGTHS = 12
"""Lengths that a thread repeats, so that plans are met again; one in four calls has a new one."""

VOCABULARY = 64
MODEL_EVERY = 40
"""Calls of one thread between two models."""

LOSSES = 2**-7
"""Relative difference of a compiled model's loss from an eager one's, as in tests/integrations/test_compile.py."""

ADDRESS_MIN = 2**22
"""Integers from here on are addresses, as in tests/kernels/stubbed_launches.py; a dropout of 0.001 has a threshold as large."""

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
_alone = threading.Lock()
"""Held by who switches plans off, compiles or profiles: these are settings of the whole process."""


def model_of(family: str) -> torch.nn.Module:
    """A model of two layers with head dimension 64, in bfloat16 and training, without dropout."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))
    else:
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 64}
        model = LlamaForCausalLM(LlamaConfig(**sizes)) if family == "llama" else Qwen3ForCausalLM(Qwen3Config(**sizes))
    return model.to(DEVICE, torch.bfloat16).train()


def draw_call(draw: random.Random, rows: int) -> dict[str, Any]:
    """Shape and options of one call; `keys` in place of `rows` where the lengths differ."""
    heads, kv_heads = draw.choice([(1, 1), (2, 1), (4, 2), (4, 4), (8, 2)])
    call: dict[str, Any] = {"batch": draw.choice([1, 1, 2, 3]), "heads": heads, "kv_heads": kv_heads, "rows": rows}
    call |= {"dim": draw.choice([32, 64, 64, 80, 128, 128]), "keys": rows, "seed": draw.randrange(2**31)}
    call |= {name: draw.random() < share for name, share in (("count", 0.7), ("observe", 0.2), ("heads_first", 0.2))}
    options: dict[str, Any] = {"causal": draw.random() < 0.8, "incoherent": draw.random() < 0.8}
    kind = draw.choice(["plain", "rotary", "rotary", "norms", "packed", "rows", "ranges", "more keys"])
    if kind == "more keys":
        call["keys"] = rows + draw.randrange(1, 64)
    if options["causal"] and draw.random() < 0.3:
        options["window"] = draw.randrange(1, 2 * rows)
    if draw.random() < 0.2:
        options |= {"dropout_p": 0.1 if ON_GPU else 0.0005, "dropout_seed": draw.randrange(2**40)}
    if draw.random() < 0.15:
        options["softcap"] = draw.choice([5.0, 50.0])
    if draw.random() < 0.1:
        options["precision"] = "high"
    return call | {"kind": kind, "logits": draw.random() < 0.1, "options": options}


def attend(call: dict[str, Any]) -> list[Tensor | None]:
    """Output and gradients of one call; the same call gives the same operands."""
    generator = torch.Generator().manual_seed(call["seed"])
    batch, heads, kv_heads, dim, kind = (call[name] for name in ("batch", "heads", "kv_heads", "dim", "kind"))
    counts, options = (heads, kv_heads, kv_heads), dict(call["options"])

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.rand(shape, generator=generator).to(DEVICE, dtype)

    if kind == "packed":
        leaves = [tensor(batch, call["rows"], sum(counts) * dim).requires_grad_()]
        operands = leaves[0].unflatten(2, (-1, dim)).transpose(1, 2).split(counts, dim=1)
        options["packed"] = leaves[0]
    else:
        lengths = (call["rows"], call["keys"], call["keys"])
        leaves = [tensor(batch, n, c * dim).requires_grad_() for n, c in zip(lengths, counts, strict=True)]
        operands = tuple(x.unflatten(2, (-1, dim)).transpose(1, 2) for x in leaves)
        if kind == "rows":
            options["packed"] = tuple(leaves)
        elif call["heads_first"]:
            operands = tuple(x.contiguous() for x in operands)
    if kind in ("rotary", "norms", "packed", "rows"):
        angles = tensor(1, call["rows"], dim)
        options["rotary"] = angles[..., : dim // 2], angles[..., dim // 2 :]
    if kind == "norms":
        leaves += [tensor(dim).requires_grad_(), tensor(dim).requires_grad_()]
        options["qk_norm"] = *leaves[-2:], 1e-6
    if kind == "ranges":
        span = torch.tensor([call["rows"] // 3, call["rows"]], dtype=torch.int32, device=DEVICE)
        options["key_range"] = span.repeat(batch, call["rows"], 1)
    if call["logits"]:
        options["logit_quant_scale"] = 1 + tensor(heads, dtype=torch.float32)
    scales = 16 * (1 + tensor(sum(counts), dtype=torch.float32))
    options |= dict(zip(("q_quant_scale", "k_quant_scale", "v_quant_scale"), scales.split(counts), strict=True))
    options["statistics"] = AttentionStatistics(observe_logits=call["observe"]) if call["count"] else None
    out = fp8_attention(*operands, backend="triton", **options)
    grads = torch.autograd.grad(out, leaves, tensor(*out.shape).to(out.dtype), allow_unused=True)
    return [out.detach(), *grads]


class OfThread(threading.local):
    """Stubbed launches of the thread that asks: a list, in the place of `stubbed_launches.launches`."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def append(self, launch: Any) -> None:
        self.made.append(launch)


class Stress:
    """What all threads share."""

    def __init__(self, seed: int, seconds: float, stubs: Any):
        self.seed, self.stubs, self.ends = seed, stubs, time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.errors: list[BaseException] = []

    def compare(self, call: dict[str, Any]) -> None:
        """Raise AssertionError unless a call repeated from a plan does what it does launched by Triton's Python."""
        with _alone:
            direct = [self._run(call, follow=True) for _ in range(2)][1]
            ordinary = self._run(call, follow=False)
        if direct != ordinary:
            pairs = itertools.zip_longest(direct, ordinary)
            number, (found, expected) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
            seen = "" if self.stubs is None else f": {found}, not {expected}"
            raise AssertionError(
                f"a plan's result {number} is another than that of Triton's launches{seen}; call {call}"
            )
        self.counts["compared"] += 1

    def _run(self, call: dict[str, Any], follow: bool) -> list:
        """Bits of the results, or without a GPU what was launched, addresses apart."""
        followed, launcher._FOLLOWED = launcher._FOLLOWED, follow
        try:
            if self.stubs is not None:
                self.stubs.launches.made.clear()
            results = attend(call)
            if self.stubs is None:
                return [
                    None if x is None else x.cpu().contiguous().view(torch.uint8).numpy().tobytes() for x in results
                ]
            return [(x.grid, x.function, [plain(a) for a in x.arguments]) for x in self.stubs.launches.made]
        finally:
            launcher._FOLLOWED = followed

    def run(self, thread: int) -> None:
        """Calls and models until the time is over."""
        draw = random.Random(f"{self.seed} {thread}")
        rows = ROWS if ON_GPU else ROWS // 8
        lengths = [draw.randrange(1, rows) for _ in range(LENGTHS)]
        stream = torch.cuda.Stream() if ON_GPU else None
        try:
            with torch.cuda.stream(stream) if stream else nullcontext():
                for number in itertools.count(1):
                    if time.monotonic() > self.ends or self.errors:
                        return
                    call = draw_call(draw, draw.randrange(1, rows) if draw.random() < 0.25 else draw.choice(lengths))
                    if draw.random() < 0.2:
                        self.compare(call)
                    else:
                        attend(call)
                        if self.stubs is not None:
                            self.stubs.launches.made.clear()
                    self.counts["calls"] += 1
                    if draw.random() < 0.01:
                        replay.forget()
                    if draw.random() < 0.02:
                        gc.collect()
                    if number % MODEL_EVERY == 0:
                        self.live(draw)
        except BaseException as error:
            self.errors.append(error)
            raise

    def live(self, draw: random.Random) -> None:
        """One model's life."""
        model = patch_model(model_of(draw.choice(["llama", "qwen3", "gpt2"])), backend="triton")
        ids = torch.randint(VOCABULARY, (1, draw.randrange(2, 96)), device=DEVICE)
        with _alone:
            profiled = draw.random() < 0.5
            compiled = draw.random() < (0.5 if ON_GPU else 0.1)
            eager = steps(model, ids, 2, profiled)
            if compiled:
                torch.compiler.reset()
                for layer in getattr(model.base_model, "layers", None) or model.base_model.h:
                    layer.compile()
                loss = steps(model, ids, 2, profiled)
                if ON_GPU and abs(loss - eager) > LOSSES * abs(eager):
                    raise AssertionError(f"loss {loss} compiled, {eager} eager")
            self.counts.update({"models": 1, "compiled": compiled, "profiled": profiled})
        refresh_scales(model)
        geometry_report(model)
        if draw.random() < 0.5:
            unpatch_model(model)


def steps(model: torch.nn.Module, ids: Tensor, count: int, profiled: bool) -> float:
    """Forwards and backwards on unchanged weights, the last one profiled where asked; the last loss."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    for number in range(count):
        watched = profiled and number == count - 1
        with profile(activities=activities, record_shapes=True, with_stack=True) if watched else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        model.zero_grad()
    return float(loss.detach())


def plain(x: Any) -> Any:
    """An argument of a stubbed launch without its address; of an empty tensor it is 0."""
    if isinstance(x, Tensor):
        return "address" if x.numel() else 0
    if isinstance(x, int) and x >= ADDRESS_MIN:
        return "address"
    return getattr(x, "fields", None) or ("address" if hasattr(x, "data_ptr") or hasattr(x, "base") else x)


def checker() -> str:
    """Which checkers of memory this process runs under."""
    with open("/proc/self/maps") as maps:
        preloaded = "libc_malloc_debug" in maps.read()
    found = [name for name, on in (("glibc", preloaded), ("Python", os.environ.get("PYTHONMALLOC") == "debug")) if on]
    return " and ".join(found) or "no checker"


def stress(minutes: float, seed: int, threads: int, plant: Callable[[], None] | None) -> str:
    """Run all threads; what was done, in words. Raises what a thread raised first."""
    stubs = None
    if not ON_GPU:
        from tests.kernels import stubbed_launches as stubs

        stubs.launches = OfThread()
        stubs.install("wrapped" if seed % 2 else "whole")
    shared = Stress(seed, 60 * minutes, stubs)
    workers = [threading.Thread(target=shared.run, args=(n,), daemon=True) for n in range(threads)]
    for worker in workers:
        worker.start()
    try:
        if plant is not None:
            plant()
    except RuntimeError as error:
        shared.errors.insert(0, error)
    for worker in workers:
        worker.join()
    if shared.errors:
        raise shared.errors[0]
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(shared.counts.items()))
    return f"no fault under {checker()}, seed {seed}, {threads} threads: {counts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--plant", choices=sorted(PLANTS), help="a fault on purpose, which must be noticed")
    parser.add_argument("--output", type=Path, help="Markdown file to add a line to")
    arguments = parser.parse_args()
    done = stress(arguments.minutes, arguments.seed, arguments.threads, PLANTS.get(arguments.plant))
    print(done)
    if arguments.output:
        with arguments.output.open("a") as page:
            page.write(f"- {arguments.minutes:g} minutes, {', '.join(environment().values())}: {done}\n")


if __name__ == "__main__":
    main()

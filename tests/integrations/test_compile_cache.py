"""Compiled models that torch's cache has seen before: torch 2.9 to 2.13 store some views wrongly (docs/freed_memory.md)."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_geoscale import patch_model

from ..conftest import tiny_model, tokens

SCRIPT = """
import json, sys, torch
from torch._dynamo.utils import counters
from hf_geoscale import patch_model
from tests.conftest import tiny_model, tokens

placed, filled = (word == "True" for word in sys.argv[1:])
losses, hits = [], []
if placed:  # Dynamo ends a graph at more places where functions of torch are watched
    torch.set_default_device("cpu")
for _ in range(2):
    torch.compiler.reset()
    counters.clear()
    model = patch_model(tiny_model("llama").train())
    for layer in model.model.layers:
        layer.compile()
    ids = tokens(1, 64)
    loss = model(input_ids=ids, labels=ids, use_cache=filled).loss
    loss.backward()
    losses.append(loss.item())
    hits.append(counters["aot_autograd"]["autograd_cache_hit"])
print(json.dumps([losses, hits]))
"""


@pytest.mark.parametrize("filled", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("placed", [True, False], ids=["default device", ""])
def test_a_compiled_layer_comes_back_from_the_cache(tmp_path, placed, filled):
    """A process of its own: what was read of freed memory also ended in a segmentation fault."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(placed), str(filled)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    losses, hits = json.loads(done.stdout.splitlines()[-1])
    assert losses[0] == losses[1]
    assert hits[0] == 0 < hits[1]


class Shared:
    """A backend that runs graphs as they are and keeps, of their outputs with a gradient, those that share memory."""

    def __init__(self) -> None:
        self.graphs, self.groups = 0, []

    def __call__(self, graph: torch.fx.GraphModule, _):
        def run(*inputs):
            self.graphs += 1
            outputs = graph(*inputs)
            of_storage = defaultdict(list)
            for x in outputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    of_storage[x.untyped_storage()._cdata].append(tuple(x.shape))
            given = {x.untyped_storage()._cdata for x in inputs if isinstance(x, Tensor)}
            self.groups += [shapes for key, shapes in of_storage.items() if key not in given and len(shapes) > 1]
            return outputs

        return run


@pytest.mark.places_itself  # Dynamo cannot look through the mode that places tensors
@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_graphs_return_no_tensor_beside_a_view_of_it(family, use_cache, whole, request):
    torch.compiler.reset()
    device = request.config.getoption("--device")
    model, backend = patch_model(tiny_model(family).to(device).train()), Shared()
    compiled = torch.compile(model, backend=backend) if whole else model
    for layer in () if whole else getattr(model.base_model, "layers", None) or model.base_model.h:
        layer.compile(backend=backend)
    ids = tokens(2, 24).to(device)
    compiled(input_ids=ids, labels=ids, use_cache=use_cache).loss.backward()
    assert backend.graphs > 1
    assert not backend.groups
    torch.compiler.reset()

"""For every release that was read: its own functions, put into the installed transformers, are fused and give SDPA's result.

Needs the wheels: `make upstream` fetches them and runs this. Without them it is skipped, and `test_fingerprints` holds the table.
"""

import ast
import importlib.util
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_geoscale import geometry_report, patch_model
from hf_geoscale.integrations.fingerprints import definition
from hf_geoscale.integrations.known_sources import KNOWN

from ..conftest import GPT2_SHAPE, SHAPE, tokens
from ..integrations.compare import relative
from ..tolerances import GRADIENT_ERROR, OUTPUT_ERROR
from .collect import SOURCES, WHEELS, release

FAMILIES = {file.split("/")[2]: (file, names) for file, names in SOURCES.items() if "/models/" in file}
"""Model type → file in a wheel, and what is taken from it."""

SMALL = {
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "dots1": {
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
    },
    "mellum": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "gpt2": GPT2_SHAPE,
}

PRELUDE = """from __future__ import annotations
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils import generic as _generic
from transformers import integrations as _integrations
use_kernel_forward_from_hub = use_kernel_func_from_hub = lambda name: lambda kind: kind
maybe_autocast = getattr(_generic, "maybe_autocast", torch.autocast)
# transformers looks for these words: ALL_ATTENTION_FUNCTIONS.get_interface(
"""
"""What functions of other releases may name; hints are not evaluated."""

wheels = sorted(Path(WHEELS).glob("transformers-*.whl"), key=release)


def lines_of(node: ast.AST) -> range:
    """Line numbers, from 0, of a definition with its decorators."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return range(first - 1, node.end_lineno)


def transplanted(installed: str, theirs: str, names: tuple[str, ...]) -> str:
    """The installed module with another release's definitions of these names."""
    trees = ast.parse(installed), ast.parse(theirs)
    lines, other = installed.split("\n"), theirs.split("\n")
    places = [tuple(lines_of(definition(tree, name)) for tree in trees) for name in names]
    for here, there in sorted(places, key=lambda place: -place[0].start):
        lines[here.start : here.stop] = other[there.start : there.stop]
    imported = max(node.end_lineno for node in trees[0].body if isinstance(node, ast.Import | ast.ImportFrom))
    future, *rest = PRELUDE.split("\n")
    return "\n".join([future, *lines[:imported], *rest, *lines[imported:]])


def model_of(module, family: str):
    """A tiny model of a module's own classes, its weights away from their initial values."""
    from transformers import AutoConfig

    shape = SMALL[family] if family == "gpt2" else SHAPE | SMALL.get(family, {})
    torch.manual_seed(0)
    model = getattr(module, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])(AutoConfig.for_model(family, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


def step(model, ids) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check(family: str, source: str, folder: Path) -> None:
    name = f"transformers.models.{family}.transplanted"
    file = folder / "transplanted.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, ids = model_of(module, family), tokens(2, 24)
    sdpa = step(model, ids)
    logits, grads = step(patch_model(model, backend="reference"), ids)
    assert {row["front_end"] for row in geometry_report(model).rows} == {"fused"}
    assert {row["front_end_calls"] for row in geometry_report(model).rows} == {1}
    assert relative(logits, sdpa[0]) < OUTPUT_ERROR
    assert relative(grads, sdpa[1]) < GRADIENT_ERROR


@pytest.mark.cpu
@pytest.mark.skipif(
    not hasattr(AttentionInterface, "get_interface"), reason="code of later releases needs transformers 5.1 or later"
)
@pytest.mark.skipif(not wheels, reason=f"no wheels in {WHEELS} (make upstream)")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_release_takes_the_fused_path(family, tmp_path):
    file, names = FAMILIES[family]
    spec = importlib.util.find_spec(file[:-3].replace("/", "."))
    if spec is None:
        pytest.skip(f"this transformers has no {family}")
    installed, seen, releases = Path(spec.origin).read_text(), set(), 0
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as files:
            if file not in files.namelist():
                continue
            theirs = files.read(file).decode()
        releases += 1
        source = transplanted(installed, theirs, names)
        if source not in seen:
            folder = tmp_path / str(len(seen))
            folder.mkdir()
            seen.add(source)
            check(family, source, folder)
    assert releases
    # as many variants as the table tells apart, at least: each was run
    assert len(seen) >= max(len(KNOWN[f"{file[:-3].replace('/', '.')}:{name}"]) for name in names)

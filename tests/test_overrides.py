"""The configuration as keywords of `patch_model`: typed, suggested, and answered when written wrongly."""

import subprocess
import sys
from dataclasses import fields
from typing import get_type_hints

import pytest

from hf_geoscale import GeoScaleConfig, SpanScaling, config, patch_model
from hf_geoscale.config import GeoScaleOverrides, resolve_config
from hf_geoscale.integrations import patched_layers

from .conftest import tiny_model


def test_overrides_are_the_fields_of_the_config():
    names = {"SpanScaling": SpanScaling}
    expected = get_type_hints(GeoScaleConfig, vars(config), names)
    assert get_type_hints(GeoScaleOverrides, vars(config), names) == expected
    assert list(GeoScaleOverrides.__annotations__) == [field.name for field in fields(GeoScaleConfig)]
    assert GeoScaleOverrides.__total__ is False


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("precison", "precision"),
        ("bakend", "backend"),
        ("quantise_logits", "quantize_logits"),
        ("fused_frontend", "fused_front_end"),
        ("head_room", "headroom"),
    ],
)
def test_a_misspelt_keyword_gets_a_suggestion(given, meant):
    message = rf"patch_model\(\) got an unexpected keyword argument '{given}'; did you mean '{meant}'\?.*Fields of"
    with pytest.raises(TypeError, match=message):
        patch_model(tiny_model("llama"), **{given: 1})


def test_an_unknown_keyword_gets_the_list():
    with pytest.raises(
        TypeError, match=r"keyword argument 'colour'\. Fields of GeoScaleConfig: scaling, quantize_logits"
    ):
        patch_model(tiny_model("llama"), colour="red")


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("high", "got 'high'; write precision='high'"),
        ("reference", "got 'reference'; write backend='reference'"),
        ("delayed", "got 'delayed'; write scaling='delayed'"),
        ("rank_aware", "got 'rank_aware'; write bound='rank_aware'"),
        ("sdpa", "got 'sdpa'; write fallback='sdpa'"),
        ("fp8", r"got 'fp8'; fields are given by name, such as precision='high'"),
        ({"precision": "high"}, r"got a dict; write GeoScaleConfig\(\*\*options\), or pass the options as keywords"),
        (GeoScaleConfig, r"got the class itself; write GeoScaleConfig\(\)"),
        (4.0, r"got 4\.0; fields are given by name"),
    ],
)
def test_a_configuration_that_is_none(given, answer):
    model = tiny_model("llama")
    with pytest.raises(TypeError, match=f"patch_model: config must be a GeoScaleConfig, {answer}"):
        patch_model(model, given)
    assert not patched_layers(model)


def test_keywords_change_a_configuration():
    base = GeoScaleConfig(headroom=2.0)
    assert resolve_config(base, {"precision": "high"}, "f") == GeoScaleConfig(headroom=2.0, precision="high")
    assert resolve_config(None, {}, "f") == GeoScaleConfig()
    with pytest.raises(ValueError, match="precision must be one of"):
        resolve_config(None, {"precision": "low"}, "f")


SNIPPET = """
from transformers import LlamaForCausalLM
from hf_geoscale import GeoScaleConfig, patch_model

def good(model: LlamaForCausalLM) -> LlamaForCausalLM:
    patch_model(model, precision="high", headroom=2.0, max_length=None)
    return patch_model(model, GeoScaleConfig(), backend="auto")

def bad(model: LlamaForCausalLM) -> None:
    patch_model(model, precison="high")  # line 10
    patch_model(model, precision="low")  # line 11
    patch_model(model, headroom="4")  # line 12
    patch_model(model, "high")  # line 13
"""


def test_mypy_sees_what_is_wrong(tmp_path):
    """As a user's type checker does, with the package's `py.typed`."""
    pytest.importorskip("mypy")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    options = [
        "--ignore-missing-imports",
        "--follow-imports=silent",
        "--no-error-summary",
        "--cache-dir",
        str(tmp_path),
    ]
    skipped = tmp_path / "mypy.ini"
    skipped.write_text(
        "[mypy]\n[mypy-transformers.*,torch.*]\nfollow_imports = skip\nfollow_imports_for_stubs = True\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(skipped), *options, str(tmp_path / "snippet.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = {int(line.split(":")[1]): line for line in done.stdout.splitlines() if ": error: " in line}
    assert set(lines) == {10, 11, 12, 13}, done.stdout + done.stderr
    assert 'Unexpected keyword argument "precison"' in lines[10]

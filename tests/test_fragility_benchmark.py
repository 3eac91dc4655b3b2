"""benchmarks/fragility.py at its smallest: nulls, measured mismatch, planted events, and the page it writes."""

import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_geoscale import patch_model

from .conftest import tiny_model, tokens

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = (
    "fragility",
    "fragility_layers",
    "fragility_measure",
    "fragility_nulls",
    "fragility_tables",
    "fragility_training",
    "fragility_warnings",
)


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield {name: __import__(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def test_rank_correlation_and_its_null(scripts):
    nulls = scripts["fragility_nulls"]
    assert nulls.spearman([1, 2, 3, 4], [10, 20, 25, 900]) == pytest.approx(1)
    assert nulls.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert nulls.spearman([1, 2, 3], [5, 5, 5]) == 0
    assert nulls.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)  # ties share their rank
    for length in range(5, 40):  # one exchange of neighbours is as good as another: equal to the last bit
        order = np.arange(length)
        exchanged = [np.r_[order[:i], i + 1, i, order[i + 2 :]] for i in range(length - 1)]
        assert len({nulls.spearman(x, order) for x in exchanged}) == 1
    third = np.arange(30.0)
    own = np.random.default_rng(2).standard_normal((2, 30))
    x, y = third + 8 * own[0], third + own[0] + 4 * own[1]
    a, b, c = (nulls.ranks(series) for series in (x, y, third))
    a, b = a - (a @ c) / (c @ c) * c, b - (b @ c) / (c @ c) * c  # what a regression on the third's ranks leaves
    assert nulls.partial_spearman(x, y, third) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert nulls.partial_spearman(third, y, third) == 0
    noise = np.random.default_rng(0).standard_normal(40)
    assert nulls.circular_shift_p(noise, noise) == 1 / 40
    other = np.random.default_rng(1).standard_normal((200, 40))
    p = [nulls.circular_shift_p(noise, row) for row in other]
    assert 0.02 < np.mean(np.array(p) <= 0.1) < 0.2  # uniform under the null
    walk = np.cumsum(other, axis=1)
    assert nulls.spearman(nulls.differences(np.exp(walk[0])), other[0][1:]) == pytest.approx(1)


def test_only_the_target_layer_is_perturbed(scripts):
    measure = scripts["fragility_measure"]
    model, ids = tiny_model("llama"), tokens(1, 40)
    eight = measure.one_layer_at_a_time(model, ids, "float8_e4m3")
    bf16 = measure.one_layer_at_a_time(model, ids, "bfloat16")
    assert len(eight) == len(bf16) == 2
    assert all(0 < b < e < 0.5 for b, e in zip(bf16, eight, strict=True))
    assert model.config._attn_implementation == "sdpa"
    whole = measure.whole_model(model, ids)
    assert 0 < whole["float16"] < whole["bfloat16"] < whole["float8_e4m3"] < 1
    exact = measure.logits(model, ids)
    with torch.no_grad():
        both = float((measure.logits(patch_model(model), ids) - exact).norm() / exact.norm())
    assert max(eight) < both < 3 * sum(eight)


def test_events(scripts):
    training = scripts["fragility_training"]
    falling = [3.0 - 0.01 * i for i in range(60)]
    assert training.blow_up(falling) is None
    assert training.blow_up([*falling, 2.5 + training.BLOW_UP]) == 60
    assert training.blow_up([*falling, float("nan")]) == 60
    steps = list(range(0, 40, 2))
    assert training.error_spike(steps, [0.01] * 20) is None
    assert training.error_spike(steps, [*[0.01] * 12, 0.021, *[0.01] * 7]) == 24


def test_the_share_of_windows_with_a_warning(scripts):
    tables, rule = scripts["fragility_tables"], scripts["fragility_warnings"].RULE
    begin = rule["span"] + rule["warm_up"]
    run = {"every": 1, "steps": begin + 20, "warned": {"κ_softmax": [begin + 10]}}
    assert tables.window_rate(run, "κ_softmax", 5) == 5 / 16
    assert tables.window_rate(run | {"warned": {"κ_softmax": []}}, "κ_softmax", 5) == 0


def test_the_sentence_on_warnings(scripts):
    ramp = {"instability": 50, "ramp": 20, "warned": {"κ_softmax": [10, 30, 32], "gradient norm": [55]}}
    stable = {"instability": None, "ramp": None, "warned": {"κ_softmax": [], "gradient norm": [7]}}
    said = scripts["fragility_tables"].warning_verdict([ramp, ramp | {"instability": None}], [stable])
    assert (
        "κ_softmax warned before 1 of 1 instabilities of the loss, by a median of 20 steps, and in 0 of 1 stable"
        in said
    )
    assert "gradient norm warned before 0 of 1 instabilities of the loss and in 1 of 1 stable runs" in said
    assert "n = 2 ramps and 1 stable runs" in said


def test_ratios_are_calibrated_to_no_false_alarm_in_the_tuning_runs(scripts):
    warnings = scripts["fragility_warnings"]
    flat = [1.0] * 40
    runs = [
        {
            "observed": list(range(41)),
            "signals": {name: [*flat, 1 + i + last] for i, name in enumerate(warnings.SIGNALS)},
        }
        for last in (0.5, 2.0)
    ]
    ratios = warnings.calibrated(runs)
    assert list(ratios.values()) == pytest.approx([3.0, 4.0, 5.0, 6.0])
    assert all(not steps for run in runs for steps in warnings.warned(run, ratios).values())
    less = {name: ratio - 1e-6 for name, ratio in ratios.items()}
    assert all(steps == [40] for steps in warnings.warned(runs[1], less).values())
    assert warnings.excess([*flat, float("nan")]) == float("inf")
    assert warnings.excess(flat[::-1]) == 1.0


def test_parts_are_written_as_they_end_and_not_done_again(scripts, tmp_path):
    main, path, calls = scripts["fragility"], tmp_path / "records.jsonl", []

    def part(name: str, fails: bool = False) -> list[dict]:
        calls.append(name)
        if fails:
            raise KeyboardInterrupt
        return [{"kind": "layers", "name": name}]

    first, second = (lambda fails=False, name=name: part(name, fails) for name in "ab")
    with pytest.raises(KeyboardInterrupt):
        main.measure({"a": first, "b": lambda: second(True)}, {"command": "x"}, path, 60.0)
    assert [json.loads(line).get("kind") for line in path.read_text().splitlines()] == [None, "layers", "part"]
    assert not main.measure({"a": first, "b": second}, {"command": "x"}, path, 0.0)
    assert main.measure({"a": first, "b": second}, {"command": "x"}, path, 60.0)
    assert calls == ["a", "b", "b"]
    assert len(path.read_text().splitlines()) == 5
    with pytest.raises(ValueError, match="give another --output, or remove it"):
        main.measure({}, {"command": "y"}, path, 60.0)


def settings(ours: list[float], norms: list[float], entropy: list[float]) -> list[dict]:
    scores = {"risk": ours, "norms: certificate of the logits": norms, "entropy": entropy}
    one = {
        "kind": "layers",
        "model": "a",
        "precision": "float8_e4m3",
        "scores": scores,
        "measured": [1.0, 2.0, 3.0, 4.0],
    }
    return [one, one]


@pytest.mark.parametrize(
    ("ours", "norms", "entropy", "said"),
    [
        ([1, 2, 3, 4], [4, 3, 2, 1], [1, 3, 2, 4], "better than both"),
        ([1, 3, 2, 4], [4, 3, 2, 1], [1, 2, 3, 4], "better than the norm-only baseline, but not than entropy"),
        ([1, 3, 2, 4], [1, 2, 3, 4], [4, 3, 2, 1], "better than entropy, but not than the norm-only"),
        ([4, 3, 2, 1], [1, 2, 3, 4], [1, 2, 3, 4], "no better than either"),
    ],
)
def test_the_verdict_follows_the_numbers(scripts, ours, norms, entropy, said):
    assert said in scripts["fragility_layers"].verdict(settings(ours, norms, entropy))


def test_the_verdict_tells_models_apart(scripts):
    good, bad = settings([1, 2, 3, 4], [4, 3, 2, 1], [1, 3, 2, 4]), settings([4, 3, 2, 1], [1, 2, 3, 4], [1, 2, 3, 4])
    said = scripts["fragility_layers"].verdict([*good, *({**record, "model": "b"} for record in bad)])
    assert "error, on a better than both the norm-only and the entropy baseline; on b no better than either" in said
    assert "By model: a +1.00 against -1.00 (norms) and +0.80 (entropy); b -1.00 against +1.00 (norms)" in said


def test_the_published_page_is_rendered_from_its_records(scripts):
    records = BENCHMARKS.parent / "docs" / "fragility.jsonl"
    if not records.exists():
        pytest.skip("docs/fragility.jsonl has not been recorded yet")
    host, *found = map(json.loads, records.read_text().splitlines())
    assert scripts["fragility_tables"].to_markdown(host, found) == records.with_suffix(".md").read_text()


@pytest.mark.cpu
def test_a_run_becomes_a_page(scripts, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    main = scripts["fragility"]
    small = {"shape": {"width": 64, "layers": 2}, "length": 24, "long": 24, "lengths": (24,), "steps": 6, "every": 3}
    small |= {
        "batch": 2,
        "checkpoints": (0,),
        "series_seeds": (0,),
        "seeds": (0,),
        "ramp": 3,
        "planted_every": 3,
        "planted_steps": 6,
        "tuning_checkpoints": (0, 2),
    }
    monkeypatch.setattr(main, "QUICK", main.QUICK | small | {"cost_steps": 1})
    text = "".join(chr(97 + i % 26) for i in range(4000))
    monkeypatch.setattr(main, "read_text", lambda _: text)
    monkeypatch.setattr(main, "load", lambda _: (tiny_model("llama"), None))
    monkeypatch.setattr(main, "token_blocks", lambda tokenizer, text, length, count: tokens(count, length))
    page, started = tmp_path / "fragility.md", []

    def run(command: list[str], check: bool) -> None:
        """In this process, where the models above are."""
        started.append(command[command.index("--parts") + 1])
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            main.main()

    monkeypatch.setattr(main, "subprocess", SimpleNamespace(run=run))
    in_turn = nullcontext(SimpleNamespace(map=map))
    monkeypatch.setattr(main, "ThreadPoolExecutor", lambda workers: in_turn)
    argv = ["fragility.py", "some/llama", "--quick", "--device", "cpu", "--output", str(page), "--workers", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    main.main()
    assert len(started) == len(set(started)) > 5
    assert not {"cost", "fine-tuning cost"} & set(started)  # these measure time, alone
    written = page.read_text()
    for heading in ("Which layers", "Lengths and precisions", "Over training steps", "Early warning", "Cost of"):
        assert f"## {heading}" in written
    assert "nan" not in written
    assert "| llama, 2 layers, 2 settings | p | GPT-2 trained here, 2 layers, 1 settings | p |" in written
    arguments = ["fragility.py", "--render", str(page.with_suffix(".jsonl")), "--output", str(tmp_path / "again.md")]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(main, "plot", lambda records, path: None)  # drawn once already, which takes seconds
    main.main()
    assert (tmp_path / "again.md").read_text() == written
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_what_the_readme_says_of_it():
    page, readme = (
        " ".join((BENCHMARKS.parent / name).read_text().split()) for name in ("docs/fragility.md", "README.md")
    )
    assert "on GPT-2 trained here no better than either the norm-only or the entropy baseline; on SmolLM2" in page
    assert "SmolLM2-135M-Instruct better than both the norm-only and the entropy baseline;" in page
    assert (
        "SmolLM2's layers by their measured FP8 error better than weight norms or entropy do, but no better" in readme
    )
    assert "those of a small GPT-2 no better than either" in readme
    ours, depth = re.search(r"; SmolLM2-135M-Instruct ([-+.\d]+) against .* and ([-+.\d]+) \(depth\)", page).groups()
    assert float(ours) <= float(depth)
    assert f"no better than their index does (rank correlation {ours} against {depth})" in readme
    assert "κ_softmax warned before 0 of 3 instabilities of the loss" in page
    assert (
        "the same rule on loss warned before 3 of 3 instabilities of the loss, by a median of 5 steps, and in 1 of 3 stable"
        in page
    )
    assert (
        "the early warning came before none of three planted instabilities, the same rule on the loss before all three"
        in readme
    )
    assert "with a false alarm in one of three stable runs" in readme

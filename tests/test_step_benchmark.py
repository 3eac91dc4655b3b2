"""benchmarks/step.py at its smallest: its rows, its gate, its page."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

pytestmark = [pytest.mark.cpu]
ROOT = Path(__file__).parent.parent
BOTH = ["SDPA flash", "hf_geoscale"]


@pytest.fixture(scope="module")
def step():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module("step")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def configuration(step, setting: str = "plain"):
    return step.Configuration("smoke", 64, setting, None, 2)


def statuses(rows: list[dict]) -> dict[str, str]:
    return {row["contender"]: row["status"] for row in rows}


def test_a_run_and_its_page(step, tmp_path, capsys):
    records = tmp_path / "step.jsonl"
    contenders = ["--contenders", "SDPA cuDNN", *BOTH]
    options = [
        "--models",
        "smoke",
        "--lengths",
        "64",
        "--settings",
        "plain",
        "checkpointing",
        "--steps",
        "2",
        *contenders,
    ]
    step.main([*options, "--output", str(records)])
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert [(r["setting"], r["contender"]) for r in rows] == [
        (setting, name) for setting in ("plain", "checkpointing") for name in ("SDPA cuDNN", *BOTH)
    ]
    for row in rows:
        if row["contender"] == "SDPA cuDNN":  # there is none on a CPU
            assert row["status"].startswith("failed: RuntimeError: No viable backend")
            continue
        assert row["status"] == "ok"
        first = row["first_steps"]
        assert abs(first["hf_geoscale"]["norm"] / first["SDPA flash"]["norm"] - 1) < first["allowed"]["norm"] < 0.1
        assert len(row["times"]["step"]) == 2
        if row["contender"] == "hf_geoscale":
            assert row["counters"]["calls"] > 0
            assert row["counters"]["fallback_calls"] == row["counters"]["overflows"] == 0
        assert len(row["times"]["refresh"]) == (2 if row["contender"] == "hf_geoscale" else 0)
        assert all(a > b for a, b in zip(row["times"]["step"], row["times"]["refresh"], strict=False))
    step.main([*options, "--output", str(records)])
    assert len(records.read_text().splitlines()) == len(rows), "a measured configuration ran again"
    step.main(["--render", str(records), "--output", str(tmp_path / "page")])
    page = (tmp_path / "page.md").read_text()
    assert page.count("| 64 | 2 | SDPA flash |") == 2
    assert "vocabulary 128 (64 to 64 tokens)" in page
    assert (tmp_path / "page.png").stat().st_size > 0


def test_wrong_attention_is_not_timed(step):
    AttentionInterface.register(
        "sees_the_future", lambda *a, **k: sdpa_attention_forward(*a, **(k | {"is_causal": False}))
    )
    AttentionMaskInterface.register("sees_the_future", lambda *a, **k: None)
    comparison = step.Comparison(configuration(step), [*BOTH, "SDPA cuDNN"], "cpu")
    wrong = comparison.contend("hf_geoscale")
    wrong.model.set_attn_implementation("sees_the_future")
    comparison.contenders["hf_geoscale"] = wrong
    comparison.gate()
    assert list(comparison.contenders) == ["SDPA flash"]
    assert comparison.status["hf_geoscale"].startswith("wrong: losses of tokens differ by")


def test_the_gate_at_full_length(step):
    gate = sys.modules["step_gate"]
    allowed = gate.Tolerance(0.1, 0.001, {"first q": 0.1, "last v": 0.2}, 0.05)
    assert allowed.mean_loss(400) == pytest.approx(0.001 + 4 * 0.05 / 20)
    losses = torch.full((400,), 2.0)
    right = gate.FirstStep(2.0, torch.tensor([6.0, 8.0]), losses)

    def found(loss: float = 2.0, norm: float = 10.0, tokens: torch.Tensor = losses) -> str | None:
        return gate.wrong_in_full(gate.FirstStep(loss, torch.tensor([norm]), tokens), right, allowed)

    assert found(2.0109, 10.4, losses + 0.0109) is None
    assert "loss 2.01200, SDPA's 2.00000, allowed difference 1.10e-02" in found(2.012, tokens=losses + 0.012)
    apart = 0.11 * torch.ones(400).index_fill(0, torch.arange(200), -1.0)
    assert found(tokens=losses + apart) == "losses of tokens differ by 1.10e-01, allowed 1.00e-01"
    assert "gradient norm 10.6, SDPA's 10" in found(norm=10.6)
    assert all(map(found, (float("nan"), 2.0, 2.0), (10.0, float("nan"), 10.0), (losses, losses, losses * torch.nan)))


def test_losses_of_tokens(step, monkeypatch):
    gate = sys.modules["step_gate"]
    monkeypatch.setattr(gate, "CHUNK", 5)
    logits, ids = torch.randn(2, 9, 7), torch.randint(7, (2, 9))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(gate.losses_of_tokens(logits, ids), expected.flatten())


def _sdpa_off_by_one(module, query, key, value, mask, **options):
    """Every token but the last sees its successor."""
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(1)
    return sdpa_attention_forward(module, query, key, value, visible[None, None], **options | {"is_causal": False})


def _short_sums(module, query, key, value, mask, **options):
    """O of rows of more than 64 keys loses up to three tenths where the values that it averages are alike."""
    out, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
    alike = value.cumsum(2).abs() / value.abs().cumsum(2)  # (B, Hkv, L, D)
    lost = 0.6 * (alike - 0.5).clamp_min(0).repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2)
    lost[:, :64] = 0
    return out * (1 - lost), weights


FAULTS = {
    "a mask off by one": _sdpa_off_by_one,
    "twice the logits": lambda m, q, k, v, mask, **o: sdpa_attention_forward(m, 2 * q, k, v, mask, **o),
    "twice the values": lambda m, q, k, v, mask, **o: sdpa_attention_forward(m, q, k, 2 * v, mask, **o),
}


def beyond_the_gate(step, faults: dict, monkeypatch):
    """A comparison of 256 tokens with attention that is wrong beyond GATE_LENGTH, and what its gate allows.

    Queries and keys are as far from zero as those of Llama-3-8B's shape: logits of standard deviation 1.6.
    """
    monkeypatch.setattr(step, "GATE_LENGTH", 64)
    comparison = step.Comparison(step.Configuration("smoke", 256, "plain", None, 2), BOTH, "cpu")
    with torch.no_grad():
        for layer in comparison.base.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight *= (4096 / 128) ** 0.5
    comparison.contenders["hf_geoscale"] = comparison.contend("hf_geoscale")  # scales of the new weights
    for name, wrong in faults.items():

        def attend(module, query, *rest, wrong=wrong, **options):
            right = query.shape[2] <= 64
            return (sdpa_attention_forward if right else wrong)(module, query, *rest, **options)

        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, lambda *a, **k: None)
        comparison.contenders[name] = comparison.contend("SDPA flash")
        comparison.contenders[name].model.set_attn_implementation(name)
    return comparison, comparison.gate()


def test_faults_beyond_the_gates_length_are_found_at_full_length(step, monkeypatch):
    comparison, allowed = beyond_the_gate(step, FAULTS, monkeypatch)
    assert list(comparison.contenders) == BOTH
    assert set(comparison.first) == {*BOTH, *FAULTS, "allowed"}, "found before the full length"
    assert all(comparison.status[name].startswith("wrong: losses of tokens differ by") for name in FAULTS)
    assert allowed.mean_loss(255) < 0.2 * allowed.loss


def test_sums_that_are_too_short_are_found_on_repeated_tokens(step, monkeypatch):
    comparison, _ = beyond_the_gate(step, {"short sums": _short_sums}, monkeypatch)
    assert list(comparison.contenders) == BOTH
    assert comparison.status["short sums"].startswith("wrong: on repeated tokens, ")


def test_no_memory_is_a_row(step, monkeypatch):
    refresh = step.time_block

    def scarce(contender, *arguments):
        if contender.ours:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        refresh(contender, *arguments)

    monkeypatch.setattr(step, "time_block", scarce)
    rows = step.compare(configuration(step), BOTH, {}, steps=1)
    assert statuses(rows) == {"SDPA flash": "ok", "hf_geoscale": "out of memory"}

    def none(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "build", none)
    assert set(statuses(step.compare(configuration(step), BOTH, {})).values()) == {"out of memory"}


def test_the_budget_ends_a_run_between_configurations(step, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 10))  # each look at it is ten seconds later
    monkeypatch.setattr(step.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(step, "compare", lambda *_: [])
    monkeypatch.setattr(step, "release", lambda: None)  # nothing to free, in half a second each time
    options = ["--models", "smoke", "--settings", "plain", "--lengths"]
    step.main([*options, "64", "128", "256", "512", "--budget-seconds", "69"])
    printed = capsys.readouterr().out
    assert "smoke, 128 tokens" in printed
    assert "stopped before smoke, 256 tokens, plain: 50 s used, and it would take about 25 s" in printed
    step.main([*options, "64", "32", "16", "8", "--budget-seconds", "69"])
    printed = capsys.readouterr().out
    assert "stopped before smoke, 8 tokens, plain: 70 s used, and it would take about 10 s" in printed


def test_ratios_are_to_the_faster_sdpa_of_the_last_rows(step):
    report = sys.modules["step_report"]

    def row(contender: str, milliseconds: float, layers: int = 2) -> dict:
        times = {"step": [milliseconds], "refresh": [], "refresh_host": [], "launch": [1.0], "peak_bytes": 2**30}
        shared = {
            "model": "m",
            "window": None,
            "setting": "plain",
            "length": 64,
            "layers": layers,
            "layers_limit": None,
        }
        return shared | {"contender": contender, "status": "ok", "times": times}

    rows = [row("SDPA flash", 3.0), row("SDPA flash", 12.0), row("SDPA cuDNN", 10.0), row("hf_geoscale", 8.0)]
    kept = report.latest(rows)
    assert len(kept) == 3
    assert report.ratio(kept[-1], kept) == 10.0 / 8.0
    assert report.ratio(row("hf_geoscale", 8.0, layers=3), kept) is None
    assert "hf_geoscale (3 calls on SDPA)" in report.cells(kept[-1] | {"counters": {"fallback_calls": 3}}, kept)


def test_liger_leaves_the_modelling_file_as_it_was(step):
    pytest.importorskip("liger_kernel")
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    models = sys.modules["step_models"]
    base = models.build("smoke", 2, 64, None, "cpu")
    contender = models.contend("Liger + SDPA cuDNN", base, False)
    assert {name: x for name, x in vars(modeling_llama).items() if before.get(name) is not x} == {}
    with contender.running():
        assert "liger" in modeling_llama.apply_rotary_pos_emb.__module__
    assert modeling_llama.apply_rotary_pos_emb is before["apply_rotary_pos_emb"]
    assert "Liger" in repr(contender.model.model.layers[0].input_layernorm)
    assert "Liger" not in repr(base.model.layers[0].input_layernorm)
    assert all(a is b for a, b in zip(base.parameters(), contender.model.parameters(), strict=True))


@pytest.mark.skipif(not (ROOT / "docs/step.jsonl").exists(), reason="docs/step.jsonl is not measured yet")
def test_the_published_page_is_rendered_from_its_records(step):
    rows = [json.loads(line) for line in (ROOT / "docs/step.jsonl").read_text().splitlines()]
    report = sys.modules["step_report"]
    assert report.to_markdown(rows).strip() == (ROOT / "docs/step.md").read_text().strip()


def test_a_profile_names_what_takes_the_time_and_the_energy(step, monkeypatch, capsys):
    profile = importlib.import_module("step_profile")
    options = ["--model", "smoke", "--layers", "2", "--length", "64", "--contenders", "SDPA", "hf_geoscale"]
    profile.main([*options, "--most", "500", "--seconds", "0.01"])
    _, sdpa, ours = capsys.readouterr().out.split("\n\n")
    for name, part in (("SDPA", sdpa), ("hf_geoscale", ours)):
        head, *rows = part.strip().splitlines()
        assert re.match(name + r": \d+\.\d\d ms a step \(\d+ steps\), – J$", head)
        spent = [float(row.split()[0]) for row in rows]
        assert spent == sorted(spent, reverse=True)
        calls = {row.split()[4]: float(row.split()[2]) for row in rows}
        assert calls["aten::_fused_adamw_"] == 1
    assert "aten::scaled_dot_product_attention" in sdpa
    assert "aten::scaled_dot_product_attention" not in ours


def test_joules_are_the_counters_differences_by_step(step, monkeypatch):
    profile = importlib.import_module("step_profile")
    monkeypatch.setattr(profile, "kernels", lambda *_: [(1.5, 2.0, "a kernel")])
    monkeypatch.setattr(profile, "steps", lambda contender, optimizer, ids, count: 0.5 * count)
    readings = iter([100.0, 2500.0])
    monkeypatch.setattr(profile, "energy_counter", lambda: lambda: next(readings))
    contender, ids = SimpleNamespace(ours=False, name="x"), SimpleNamespace(is_cuda=True)
    text = profile.report(contender, None, ids, 5, seconds=4.0)
    assert text.splitlines()[0] == "x: 500.00 ms a step (8 steps), 300.0 J, 600 W"
    assert text.splitlines()[1].split() == ["1.500", "ms", "2.0", "calls", "a", "kernel"]

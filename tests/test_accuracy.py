"""The accuracy benchmark: its scorer against brute force, its definitions, and its table."""
# ruff: noqa: E402  (scripts import each other as neighbours, so their folder is put on the path first)

import copy
import json
import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy
from accuracy_scoring import Item, agreement, batches, compare, estimate, evenly_spaced, score, summarise
from accuracy_tasks import choose

from hf_geoscale import geometry_report

from .cli.conftest import text_file, tiny_folder  # noqa: F401
from .conftest import tiny_model
from .tolerances import FLOAT32_ROUNDOFF

ROUNDOFF = 50 * FLOAT32_ROUNDOFF
"""Of a continuation's log-likelihood, nats: five tokens, logits up to ten."""

# Two share their input, and three their first tokens; the lengths are mixed.
REQUESTS = [((5, 9, 11), (7,)), ((5, 9, 11), (8,)), ((5, 9, 11), (7, 21, 33)), ((12,), (13, 14, 15, 16, 17))]
REQUESTS += [(tuple(range(3, 40)), (50, 51)), ((90, 80, 70, 60), (5, 9))]


def brute_force(model, context, continuation):
    """One token at a time, nothing batched, padded or shared: log p of each, and its whole distribution."""
    rows = []
    for i in range(len(continuation)):
        logits = model(torch.tensor([context + continuation[:i]])).logits[0, -1]
        rows.append(logits.double() - logits.double().exp().sum().log())
    return rows


@torch.no_grad()
def test_the_scorer_against_brute_force():
    models = {"a": tiny_model("llama", spread=0.3), "b": tiny_model("llama", seed=1, spread=0.3)}
    scores = score(models, REQUESTS, batch_tokens=24, max_length=64)
    for name, model in models.items():
        for (context, continuation), ours in zip(REQUESTS, scores[name], strict=True):
            exact, rows = (brute_force(m, context, continuation) for m in (models["a"], model))
            likelihood = sum(float(row[token]) for row, token in zip(rows, continuation, strict=True))
            assert ours.log_likelihood == pytest.approx(likelihood, abs=ROUNDOFF)
            kl = sum(float((e.exp() * (e - row)).sum()) for e, row in zip(exact, rows, strict=True))
            assert ours.kl == pytest.approx(kl, abs=ROUNDOFF)
            choices = [int(row.argmax()) for row in rows]
            assert ours.greedy == (choices == list(continuation))
            assert ours.agreed == sum(c == int(e.argmax()) for c, e in zip(choices, exact, strict=True))
            assert ours.tokens == len(continuation)
    assert all(s.kl == 0 and s.agreed == s.tokens for s in scores["a"])
    assert any(s.kl > 0.01 for s in scores["b"])


@torch.no_grad()
def test_long_requests_lose_tokens_on_the_left_and_impossible_ones_are_refused():
    model = tiny_model("llama")
    context, continuation = REQUESTS[4]
    (ours,) = score({"a": model}, [(context, continuation)], 64, max_length=8)["a"]
    (cut,) = score({"a": model}, [(context[-7:], continuation)], 64, max_length=8)["a"]
    assert ours == cut
    with pytest.raises(ValueError, match="1 to 2 tokens, got 5"):
        score({"a": model}, [REQUESTS[3]], 64, max_length=2)


def test_letters_of_one_question_share_a_forward():
    model = tiny_model("llama")
    shapes = []
    model.register_forward_pre_hook(lambda _, __, options: shapes.append(options["input_ids"].shape), with_kwargs=True)
    score({"a": model}, [((4, 5, 6), (letter,)) for letter in range(10, 14)], 1024, 64)
    assert shapes == [(1, 3)]


def test_batches_hold_every_input_once_and_keep_to_the_tokens():
    lengths = [3, 50, 7, 7, 30, 1, 120]
    found = batches(lengths, 60)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 60 for batch in found)


def test_kl_and_first_choices_by_hand():
    reference = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
    ours = torch.tensor([[0.3, 0.5, 0.2], [0.2, 0.2, 0.6]]).log()
    one, two = compare(reference, ours, [(1, 2), (1, 0)], [0, 0])
    kl = 0.2 * math.log(0.5 / 0.3) + 2 * 0.1 * math.log(0.1 / 0.2) + 0.8 * math.log(0.8 / 0.6)
    assert one.kl == pytest.approx(kl)
    assert (one.agreed, one.greedy, two.greedy, one.tokens) == (1, True, False, 2)
    assert two.log_likelihood == pytest.approx(math.log(0.5 * 0.2))


def test_acc_norm_divides_by_characters():
    assert choose(["no", "certainly not"], [-4.0, -6.0]) == {"acc": 0, "acc_norm": 1}


def item(correct=1.0, pick=0, likelihood=-2.0, kl=0.0, agreed=2, tokens=2) -> Item:
    return Item({"acc": correct}, {} if pick is None else {"acc": pick}, likelihood, kl, agreed, tokens)


def test_agreement_is_of_choices_then_of_whole_answers_then_of_tokens():
    reference = [item(pick=0), item(pick=1), item(pick=2), item(pick=3)]
    assert agreement("acc", [item(pick=0), item(pick=1), item(pick=2), item(pick=0)], reference, False) == 0.75
    words = [item(pick=None), item(pick=None, agreed=1)]
    assert agreement("acc", words, words, False) == 0.5
    assert agreement("perplexity", words, words, True) == 0.75


def test_the_standard_error_of_a_mean_and_of_a_ratio():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert estimate(values) == pytest.approx((0.6, statistics.stdev(values) / math.sqrt(5)))
    totals, weights = [2.0, 9.0, 4.0], [1.0, 3.0, 2.0]
    residuals = [t - 2.5 * w for t, w in zip(totals, weights, strict=True)]
    assert estimate(totals, weights) == pytest.approx((2.5, math.sqrt(1.5 * sum(r * r for r in residuals)) / 6))
    assert math.isnan(estimate([1.0]).stderr)


def test_rows_pair_the_items():
    reference = [item(1.0), item(0.0, pick=1), item(1.0), item(0.0, pick=1)]
    ours = [item(1.0, kl=0.1), item(1.0, kl=0.3, tokens=6), item(1.0, kl=0.2), item(0.0, pick=1)]
    first, second = summarise("piqa", 40, {"bf16": reference, "fp8": ours})
    assert (first["value"], first["difference"], first["agreement"], first["kl"]) == (0.5, 0.0, 1.0, 0.0)
    assert (second["value"], second["difference"], second["agreement"]) == (0.75, 0.25, 0.75)
    assert second["difference_stderr"] == pytest.approx(statistics.stdev([0, 1, 0, 0]) / 2)
    assert second["kl"] == pytest.approx(0.6 / 12)
    assert (second["items"], second["available"], second["tokens"]) == (4, 40, 12)


def test_perplexity_is_per_token():
    passages = [Item({"perplexity": -nats}, {}, -nats, 0.0, n, n) for nats, n in ((9.0, 3), (5.0, 4))]
    (row,) = summarise("perplexity", 2, {"bf16": passages})
    assert row["value"] == pytest.approx(math.exp(2.0))
    assert row["stderr"] == pytest.approx(math.exp(2.0) * math.sqrt(2 * (3**2 + 3**2)) / 7)


def test_items_are_evenly_spaced_and_always_the_same():
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 7) == evenly_spaced(3, None) == [0, 1, 2]
    assert len(evenly_spaced(14042, 1000)) == 1000
    assert {b - a for a, b in pairwise(evenly_spaced(14042, 1000))} == {14, 15}


def test_modes_share_weights_and_nothing_else():
    model = tiny_model("llama").to(torch.bfloat16)
    ours = accuracy.in_mode(accuracy.sharing_weights(model), "operands")
    assert all(a is b for a, b in zip(model.parameters(), ours.parameters(), strict=True))
    scores = score({"bf16": model, "operands": ours}, REQUESTS, 64, 64)
    assert 0 < sum(s.kl for s in scores["operands"]) < 1
    assert model.config._attn_implementation != ours.config._attn_implementation
    assert all(row["calls"] for row in geometry_report(ours).rows)


def test_modes_are_fine_tuned_on_the_same_batches():
    model = tiny_model("llama")
    start = copy.deepcopy(model.state_dict())
    ids = torch.randint(3, 96, (20, 128), generator=torch.Generator().manual_seed(0))
    modes = ("bf16", "bf16", "operands")
    (plain, losses), (_, again), (_, fp8) = (accuracy.fine_tuned(model, mode, ids, 3, seed=5) for mode in modes)
    assert losses == again
    assert losses["losses"] == pytest.approx(fp8["losses"], abs=0.05)
    assert fp8["losses"] != losses["losses"]
    assert (losses["overflows"], fp8["overflows"]) == (None, 0)
    assert plain.dtype == torch.bfloat16
    assert all(torch.equal(x, start[name]) for name, x in model.state_dict().items())


HOST = {"model": "m", "data": "d", "device": "cpu", "shots": 0, "commit": "abc", "gate_perplexity": 20.0}
HOST["finetune"] = {"steps": 7, "batch": 4, "length": 128, "learning_rate": 2e-5, "seed": 3, "text": "t"}
HOST["versions"] = {"torch": "2"}


def test_the_table_is_made_from_json_lines(tmp_path, capsys, monkeypatch):
    pair = {"bf16": [item(1.0), item(0.0), item(1.0)], "operands": [item(1.0), item(0.0), item(0.0, pick=1, kl=0.2)]}
    rows = [{"phase": phase, **row} for phase in ("before", "after") for row in summarise("mmlu_letter", 99, pair)]
    rows.append({"phase": "before", "mode": "operands", "overflows": 0, "fallback_calls": 0})
    path = tmp_path / "accuracy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (HOST, *rows)))
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--render", str(path)])
    accuracy.main()
    printed = capsys.readouterr().out
    assert "| mmlu_letter | 3 of 99 | acc | bf16 | 66.7 ± 33.3 | – | – | – | – | – |" in printed
    assert "| operands | 33.3 ± 33.3 | -33.3 ± 33.3 | yes | yes | 66.7% | 0.0333 ± 0.0333 |" in printed
    assert "Of 2 comparisons" in printed
    assert "A subset of the items" in printed
    assert "After 7 AdamW steps" in printed


def test_runs_of_different_tasks_are_merged_and_others_refused():
    def run(task, weights="a"):
        pair = {"bf16": [item(), item(0.0)], "operands": [item(), item(0.0)]}
        calls = {"phase": "before", "mode": "operands", "overflows": 1, "fallback_calls": 0}
        training = {"phase": "training", "mode": "bf16", "losses": [1.0], "overflows": None, "weights": weights}
        return [HOST, *({"phase": "before", **row} for row in summarise(task, 2, pair)), calls, training]

    merged = accuracy.merge([run("piqa"), run("lambada")])
    assert [row["task"] for row in merged if "task" in row] == ["lambada", "lambada", "piqa", "piqa"]
    assert sum(row["overflows"] for row in merged if "fallback_calls" in row) == 2
    assert len([row for row in merged if "weights" in row]) == 1
    assert accuracy.merge([run("piqa")]) == run("piqa")
    with pytest.raises(ValueError, match="trained weights"):
        accuracy.merge([run("piqa"), run("lambada", weights="b")])
    with pytest.raises(ValueError, match="more than one run of piqa"):
        accuracy.merge([run("piqa"), run("piqa")])


def test_the_published_table_is_made_from_its_records():
    rows = [json.loads(line) for line in (ROOT / "docs" / "accuracy.jsonl").read_text().splitlines()]
    assert accuracy.to_markdown(rows) == (ROOT / "docs" / "accuracy.md").read_text()

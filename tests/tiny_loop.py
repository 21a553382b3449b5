"""The whole loop through the command, on the tiny model: each verb once, and what it said.

Made once a process, for the tests of the command and for the tests that spoil its files.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tests.small_runs import request
from tests.tiny_models import MAX_POSITION, tiny_model
from xllm_lab import cli
from xllm_lab.formats import own
from xllm_lab.workload import Slo, Workload

NUM_TRIALS = 5
INSTANCE = (f"max_model_len={MAX_POSITION}", "block_size=16", "num_kv_blocks=40", "max_seqs_per_batch=8")
SETTINGS = tuple(word for setting in INSTANCE for word in ("--set", setting))


class Said(NamedTuple):
    """What one command line came to."""

    status: int
    out: str
    err: str


def said(*words: object) -> Said:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run([str(word) for word in words])
    return Said(status, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class TinyLoop:
    """Files and folders of the loop, and what each verb printed with `--json`."""

    folder: Path
    said: dict[str, Said]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


def engine_words(model: Path | None = None) -> tuple[str, ...]:
    return ("--model", str(model or tiny_model()), "--device", "cpu")


def window(start: int, *, gap_us: int) -> Workload:
    """Sixteen requests; every other one shares its first sixteen tokens, and all were promised something."""
    return Workload(
        requests=tuple(
            replace(
                request(i, gap_us * (i - start), prompt=20 + i, output=12, hashes=(1, 2, 3, 4) if i % 2 else ()),
                slo=Slo(ttft_us=200_000, tpot_us=40_000),
            )
            for i in range(start, start + 16)
        ),
        source=f"window from {start}",
    )


@functools.cache
def tiny_loop() -> TinyLoop:
    """Replay twice, calibrate, simulate, compare, check parity, tune, verify, export."""
    at = Path(_FOLDER.name)
    own.write(window(0, gap_us=0), at / "learn.jsonl")
    own.write(window(16, gap_us=2_000), at / "held-out.jsonl")
    calibrated = ("--calibration", at / "calibration.json")
    search = ("--trials", str(NUM_TRIALS), "--workers", "1")
    lines: dict[str, tuple[str | Path, ...]] = {
        "replay": ("replay", at / "learn.jsonl", *SETTINGS, *engine_words(), "--out", at / "full"),
        "replay again": ("replay", at / "held-out.jsonl", *SETTINGS, *engine_words(), "--out", at / "paced"),
        "calibrate": ("calibrate", at / "full", at / "paced", "--out", at / "calibration.json"),
        "simulate": ("simulate", "--like", at / "paced", *calibrated, "--out", at / "simulated"),
        "compare": ("compare", at / "simulated", at / "paced"),
        "parity": ("parity", at / "paced"),
        "tune": ("tune", at / "learn.jsonl", *SETTINGS, *calibrated, *search, "--out", at / "study"),
        "verify": ("verify", at / "study", at / "held-out.jsonl", *engine_words(), "--out", at / "verified"),
        "export": ("export", at / "verified", "--to", "xllm"),
        "policies": ("policies",),
    }
    told: dict[str, Said] = {}
    for name, words in lines.items():
        told[name] = said(*words, "--json", "--quiet")
        assert told[name].status == 0, f"{name}: {told[name].err}"
    return TinyLoop(at, told)


_FOLDER = tempfile.TemporaryDirectory(prefix="xllm_lab_loop_")

"""Two processes that hash strings differently write the same bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.laws import VOCAB_SIZE
from tests.small_runs import STEP_TIME, request
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.of_instance import Policies
from xllm_lab.sim.calibrate import Calibration, Residual
from xllm_lab.sim.machine import fitted_machine
from xllm_lab.sim.simulator import simulate
from xllm_lab.step_time import TERMS
from xllm_lab.workload import Priority, Slo, Workload

FILES = ("requests.parquet", "steps.parquet", "workload.jsonl")
CALIBRATION = Calibration(
    step_time=STEP_TIME,
    highest=tuple(1e9 for _ in TERMS),
    residual=Residual(mape_frac=0.0, p90_frac=0.0, bias_frac=0.0, num_steps=100),
    model={"name": "none", "vocab_size": VOCAB_SIZE},
    hardware={},
    runs=("made-up",),
)


def busy_workload() -> Workload:
    """Shared prefixes, priorities, promises and impatience, crowded enough for preemptions."""
    return Workload(
        requests=tuple(
            request(
                i,
                37 * i % 150,
                prompt=5 + 7 * i % 40,
                output=1 + 11 * i % 29,
                hashes=tuple(range(i % 6)),
                priority=Priority(1 + i % 3),
                slo=Slo(ttft_us=200 if i % 2 else None, tpot_us=20 if i % 5 == 0 else None),
                cancel_us=37 * i % 150 + 90 if i % 7 == 3 else None,
            )
            for i in range(30)
        ),
        seed=5,
    )


def write_runs(folder: Path) -> None:
    """One run of each policy, in folders named after them."""
    config = InstanceConfig(max_tokens_per_batch=24, max_seqs_per_batch=6, block_size=4, num_kv_blocks=20)
    for name in policies("batch"):
        simulate(
            busy_workload(),
            config,
            Policies(make_policy("batch", name)),
            fitted_machine(CALIBRATION),
            out=folder / name,
        )


def in_process(hash_seed: int, program: str, *arguments: str) -> str:
    """What a program prints under a hash seed."""
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same runs, written by two processes."""
    program = (
        "import pathlib, sys; from tests.test_determinism import write_runs; write_runs(pathlib.Path(sys.argv[1]));"
        "print(hash('a name'))"
    )
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    told = in_process(1, program, str(first)), in_process(2, program, str(second))
    assert told[0] != told[1], "both processes hash alike, so nothing would be proved"
    return first, second


@pytest.mark.parametrize("name", policies("batch"))
@pytest.mark.parametrize("file", FILES)
def test_files_are_byte_identical_in_any_process(folders: tuple[Path, Path], name: str, file: str) -> None:
    """Records and workload; a manifest tells of its process, and may differ."""
    digests = [hashlib.sha256((folder / name / file).read_bytes()).hexdigest() for folder in folders]
    assert digests[0] == digests[1]


def test_policies_do_decide_differently_here(folders: tuple[Path, Path]) -> None:
    """Or the files above could be equal for want of anything to decide."""
    steps = {(folders[0] / name / "steps.parquet").read_bytes() for name in policies("batch")}
    assert len(steps) == len(policies("batch"))

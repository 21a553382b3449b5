"""A search small enough for a test: a made-up machine, twelve requests, and workers in this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tests.small_runs import request
from xllm_lab.candidate import Candidate
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.sim.calibrate import Calibration, Residual
from xllm_lab.step_time import TERMS, StepTime
from xllm_lab.tuning.objective import Objective
from xllm_lab.tuning.search import tune
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import Study, Trial
from xllm_lab.tuning.tiers import Tiers
from xllm_lab.workload import Slo, Workload

A = TypeVar("A")

CALIBRATION = Calibration(
    step_time=StepTime(tuple({"eager_us": 2_000.0, "token_us": 90.0}.get(term, 0.0) for term in TERMS)),
    highest=(1e9,) * len(TERMS),
    residual=Residual(mape_frac=0.02, p90_frac=0.05, bias_frac=0.0, num_steps=100),
    model={"name": "made up", "vocab_size": 1000, "kv_bytes_per_token": 100},
    hardware={},
    runs=("none",),
)


def default(**instance: Any) -> Candidate:
    """xLLM's default policy on 64 blocks of 16 tokens."""
    own: dict[str, Any] = {"block_size": 16, "num_kv_blocks": 64, "max_seqs_per_batch": 8, **instance}
    return Candidate(instance=InstanceConfig(**own), policies=Policies(make_policy("batch", "decode-first")))


def workload(*, slo: Slo | None = None) -> Workload:
    """Long prompts among short ones, faster than they can be served."""
    return Workload(
        requests=tuple(
            replace(
                request(i, 4_000 * i, prompt=300 if i % 3 == 0 else 20 + i, output=10),
                slo=slo or Slo(ttft_us=90_000, tpot_us=12_000),
            )
            for i in range(12)
        ),
        source="twelve requests",
    )


def search(
    out: Path,
    *,
    num_trials: int = 6,
    seed: int = 0,
    num_workers: int = 1,
    space: Space | None = None,
    on: Workload | None = None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
    min_slo_attainment_frac: float = 0.0,
    tiers: Tiers | None = None,
    **more: Any,
) -> Study:
    return tune(
        [on or workload()],
        CALIBRATION,
        space or Space(default()),
        num_trials=num_trials,
        seed=seed,
        out=out,
        num_workers=num_workers,
        on_trial=on_trial,
        objective=Objective(min_slo_attainment_frac=min_slo_attainment_frac),
        tiers=tiers,
        **more,
    )


class WorkersHere:
    """In place of a pool of processes, which takes a second to start."""

    def __init__(self, num_workers: int, **_: object) -> None:
        assert num_workers > 0

    def submit(self, function: Callable[..., A], *values: Any) -> Future[A]:
        done: Future[A] = Future()
        done.set_result(function(*values))
        return done

    def shutdown(self, **_: object) -> None:
        """Nobody is here to be sent home."""

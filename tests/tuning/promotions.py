"""Verifications to put before the gate: an engine of which the truth is known, and candidates for it.

The engine answers `verify` as ours does, by runs on disk; its steps take what a planted machine takes, which may be
slower than the calibration says, differ from replay to replay, or stumble when the plot wants it to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.small_runs import request
from tests.tuning.searches import CALIBRATION
from xllm_lab.arrivals import gamma_bursts, with_arrivals
from xllm_lab.candidate import Candidate
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records
from xllm_lab.runs import Manifest, Run, describe, write_run
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.spread import Spread
from xllm_lab.tuning.intervals import Foresight
from xllm_lab.tuning.verify import Verification, verify
from xllm_lab.workload import Prompt, Slo, Workload

NOW_US = 1_800_000_000 * 10**6
HOUR_US = 3600 * 10**6
MODEL = {"name": "made up", "vocab_size": 1000, "kv_bytes_per_token": 100}
HARDWARE = {"cpu": "made up", "num_cores": 2}
VERSIONS = {"xllm-lab": "1.0", "build": "pure", "torch": "2.10"}
# Calibrated an hour ago, on this engine, and wrong by 3 % over a run.
CALIBRATED: Calibration = replace(
    CALIBRATION,
    spread=Spread(bias_frac=0.012, scatter_us=1e-9),
    model=MODEL,
    hardware=HARDWARE,
    versions=VERSIONS,
    measured_at_us=NOW_US - HOUR_US,
)


@dataclass
class PlantedEngine:
    """Serves as the calibrated machine does, but for what is planted.

    Attributes:
        factor: a step takes so many times as long, by the name of the replay, "tuned-1".
        spoil: of a replay's name and records, changes these before they are written.
        manifest: fields of manifests that are other than expected, by the name of the replay.
    """

    factor: Callable[[str], float] = lambda name: 1.0
    spoil: Callable[[str, Records], None] = lambda name, records: None
    manifest: Callable[[str], Mapping[str, Any]] = lambda name: {}
    options: Any = field(default_factory=lambda: SimpleNamespace(store=None))

    def describe(self) -> dict[str, Any]:
        return MODEL

    def replay(
        self, workload: Workload, instance: InstanceConfig, policies: Policies, *, out: Path, **_: object
    ) -> Run:
        one = Candidate(instance=instance, policies=policies)
        records = Foresight(CALIBRATED).run(one, workload, self.factor(out.name))
        self.spoil(out.name, records)
        told = {"timing": {}, "model": MODEL, "hardware": HARDWARE, "versions": VERSIONS, "host": "engine"}
        said = describe(instance, policies, None, workload)
        return write_run(out, Manifest(**{**told, **said, **self.manifest(out.name)}), workload, records)


def one(policy: str = "decode-first", *, draft: str = "off", **instance: Any) -> Candidate:
    """xLLM's default policy on 256 blocks of 16 tokens, eight at a time."""
    own: dict[str, Any] = {"block_size": 16, "num_kv_blocks": 256, "max_seqs_per_batch": 8, **instance}
    return Candidate(instance=InstanceConfig(**own), policies=Policies(make_policy("batch", policy)))


SLO = Slo(ttft_us=400_000, tpot_us=30_000)


def bursts(num: int = 60, *, rate_per_s: float = 40.0, slo: Slo = SLO, prompt: int = 60, output: int = 12) -> Workload:
    """Short questions in bursts, each promised its first token in 0.4 s."""
    requests = tuple(replace(request(i, i, prompt=prompt + 7 * (i % 5), output=output), slo=slo) for i in range(num))
    return with_arrivals(Workload(requests=requests), gamma_bursts(num, rate_per_s, 1.5, seed=3))


def sharing(num: int = 60, *, rate_per_s: float = 40.0, slo: Slo = SLO) -> Workload:
    """Every prompt begins with one of three times 320 tokens, and ends in its own."""
    requests = tuple(
        replace(
            request(i, i, prompt=340, output=12),
            prompt=Prompt(num_tokens=340, block_hashes=(i % 3,), hash_block_tokens=320),
            slo=slo,
        )
        for i in range(num)
    )
    return with_arrivals(Workload(requests=requests), gamma_bursts(num, rate_per_s, 1.5, seed=3))


def verified(
    out: Path,
    *,
    default: Candidate,
    tuned: Candidate,
    on: Workload | None = None,
    engine: PlantedEngine | None = None,
    foresight: Foresight | None = None,
    repeats: int = 3,
) -> Verification:
    """A verification, as `verify` writes it."""
    return verify(
        engine or PlantedEngine(),  # type: ignore[arg-type]
        on or bursts(),
        default=default,
        tuned=tuned,
        out=out,
        repeats=repeats,
        foresight=foresight or Foresight(CALIBRATED),
    )

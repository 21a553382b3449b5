"""Offload, tuned from one recorded trace and verified on the engine: every part real, and a model small enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tiny_models import VOCAB_SIZE, tiny_model
from tests.tuning.searches import WorkersHere
from xllm_lab import verbs
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.runs import read_run
from xllm_lab.tuning import workers
from xllm_lab.tuning.verify import runs_of
from xllm_lab.workload import Prompt, Request, RequestId, Slo, Workload

LINK_BYTES_PER_S = 2e8
SETTINGS = {
    "block_size": 16,
    "num_kv_blocks": 40,
    "max_tokens_per_batch": 256,
    "max_seqs_per_batch": 16,
    "max_model_len": 128,
}


def sessions(seed: int) -> Workload:
    """Twelve clients who say a bit more each time, in turns; the device holds half of what they said."""
    rng = np.random.default_rng(seed)
    said = [rng.integers(3, VOCAB_SIZE, 120).tolist() for _ in range(12)]
    requests = []
    for i in range(36):
        turn, session = divmod(i, 12)
        tokens = tuple(said[session][: 40 + 33 * turn])
        prompt = Prompt(num_tokens=len(tokens), token_ids=tokens)
        requests.append(
            Request(id=RequestId(i), arrival_us=4_000 * i, prompt=prompt, output_tokens=4, slo=Slo(ttft_us=10_000_000))
        )
    return Workload(requests=tuple(requests), source=f"sessions {seed}")


def test_offload_is_tuned_from_a_recorded_trace_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a link that the recorded run had, and so has the engine that verifies."""
    monkeypatch.setattr(workers, "ProcessPoolExecutor", WorkersHere)
    options = EngineOptions(
        model=str(tiny_model()),
        device="cpu",
        dtype="float32",
        timer="cpu",
        host_link_bytes_per_s=LINK_BYTES_PER_S,
    )
    host = Engine(options)
    run = verbs.replay(
        sessions(0),
        out=tmp_path / "run",
        engine=host,
        progress=False,
        policy="decode-first",
        cache="lru",
        settings=SETTINGS,
    )
    assert {c.kind for c in run.records.copies} >= {"offload", "restore"}

    fitted = verbs.calibrate([run])
    block_us = 16 * run.manifest.model["kv_bytes_per_token"] / LINK_BYTES_PER_S * 1e6
    assert fitted.copy_time, "both ways are known"
    for kind in ("offload", "restore"):
        assert fitted.copy_time.copy_us(kind, 16) >= 0.5 * block_us

    study = verbs.tune(
        [run.workload],
        fitted,
        out=tmp_path / "study",
        policy="decode-first",
        cache="lru",
        settings=SETTINGS,
        also=["cost-aware", "watermark", "device-only"],
        trials=12,
        workers=1,
        progress=False,
    )
    space = study.spec["space"]
    assert space["policies"]["cache"] == ["lru", "cost-aware", "watermark", "device-only"]
    assert space["knobs"]["cache.lru.host_blocks_factor"] == [0.25, 16.0, True]
    for name in ("cost-aware.device_cost", "watermark.low_frac", "lru.max_restoring_blocks"):
        assert f"cache.{name}" in space["knobs"]
    assert study.best.goodput_per_s >= study.default.goodput_per_s > 0
    assert len({t.candidate.policies.cache for t in study.trials}) > 3, "the tiers were not searched"

    done = verbs.verify(study, sessions(1), out=tmp_path / "verified", engine=host, progress=False)
    assert (done.default, done.tuned) == (study.default.candidate, study.best.candidate)
    assert len(done.gain.default_per_s) == len(done.gain.tuned_per_s) == 3
    for folder in runs_of(tmp_path / "verified", "default"):
        measured = read_run(folder)
        assert measured.manifest.timing["host_link_bytes_per_s"] == LINK_BYTES_PER_S
        told = measured.manifest.copy_time_model().weights
        assert dict(told) == dict(fitted.copy_time.weights), "each run was told what the search was"
        assert measured.records.copies

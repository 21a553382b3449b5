"""Validation against a measured folder: what it reads, how it judges, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sim.cost.profile_bundles import write_bundle, write_experts
from xllm_lab.errors import TraceError
from xllm_lab.known_models import known_model
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets
from xllm_lab.sim.validate.measured import MeasuredValidation, instance_config, shapes_policy, validate_measured
from xllm_lab.sim.validate.measured_folder import METRICS, STATISTICS, read_measured_folder

MODEL = known_model("llama-3.1-8b")
REQUESTS = [
    {
        "input_toks": 40,
        "output_toks": 3,
        "arrival_time": 1000.5,
        "queued_ts": 7.0,
        "first_token_ts": 7.1,
        "last_token_ts": 7.3,
    },
    {
        "input_toks": 300,
        "output_toks": 1,
        "arrival_time": 1000.0,
        "queued_ts": 6.5,
        "first_token_ts": 6.6,
        "last_token_ts": 6.6,
    },
    {
        "input_toks": 16,
        "output_toks": 5,
        "arrival_time": 1000.6,
        "queued_ts": 7.1,
        "first_token_ts": 7.5,
        "last_token_ts": 8.3,
    },
]
SUMMARY = "\n".join(
    f"{metric.capitalize() if metric == 'latency' else metric} {statistic.capitalize()}  100.0  98.0  -2.0%"
    for metric in METRICS
    for statistic in STATISTICS
)


def write_folder(
    path: Path, *, meta: dict[str, Any] | None = None, requests: list[dict[str, Any]] | None = None
) -> Path:
    write_bundle(path / "profile")
    (path / "vllm").mkdir()
    whole = {
        "engine_kwargs": {"max_num_seqs": 8},
        "kv_cache": {"num_gpu_blocks": 200, "block_size": 16},
        **(meta or {}),
    }
    (path / "vllm" / "meta.json").write_text(json.dumps(whole))
    lines = [json.dumps({"request_id": f"bench-{i}", **r}) for i, r in enumerate(requests or REQUESTS)]
    (path / "vllm" / "requests.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_measured_rows_are_from_the_moment_of_queueing(tmp_path: Path) -> None:
    found = validate_measured(write_folder(tmp_path / "machine"))
    rows = {(r.metric, r.statistic): r.measured_ms for r in found.rows}
    assert list(rows) == [(m, s) for m in METRICS for s in STATISTICS]
    assert rows["TTFT", "mean"] == pytest.approx(200)
    assert rows["TTFT", "median"] == pytest.approx(100)
    assert rows["latency", "mean"] == pytest.approx(np.mean([300, 100, 1200]))
    # One token has no time per token after the first.
    assert rows["TPOT", "mean"] == pytest.approx(150)
    assert rows["TPOT", "P90"] == pytest.approx(190)
    assert all(r.reference_error_frac is None for r in found.rows)


def test_the_simulated_rows_are_the_profiles_times(tmp_path: Path) -> None:
    """Requests far apart: each is its prompt's step and then its decodes, and nothing waits."""
    alone = [{**r, "arrival_time": 1000.0 + i} for i, r in enumerate(REQUESTS)]
    found = validate_measured(write_folder(tmp_path / "machine", requests=alone))
    rows = {(r.metric, r.statistic): r.ours_ms for r in found.rows}
    assert 10 < rows["TTFT", "mean"] < 30
    assert rows["latency", "P99"] < 5 * rows["TTFT", "P99"]
    assert found.num_preemptions == 0
    assert found.extrapolated_frac == 0


def test_the_other_simulators_rows_are_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "machine")
    (folder / "llmservingsim-summary.txt").write_text(SUMMARY + "\n")
    found = validate_measured(folder)
    assert {r.reference_ms for r in found.rows} == {98.0}
    (folder / "llmservingsim-summary.txt").write_text("\n".join(SUMMARY.splitlines()[1:]))
    with pytest.raises(TraceError, match="has 14 rows, expected TTFT, TPOT, latency by mean"):
        validate_measured(folder)


def test_what_the_folder_tells_of_the_engine_is_taken(tmp_path: Path) -> None:
    resolved = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4]}}
    kv = {"num_gpu_blocks": 101, "block_size": 32, "enable_prefix_caching": False}
    folder = read_measured_folder(write_folder(tmp_path / "m", meta={"kv_cache": kv, "resolved_config": resolved}))
    config = instance_config(folder, MODEL)
    assert (config.num_kv_blocks, config.block_size, config.enable_prefix_cache) == (100, 32, False)
    assert (config.max_seqs_per_batch, config.max_tokens_per_batch) == (8, 2048)
    assert shapes_policy(folder) == VllmBuckets(cudagraph_capture_sizes="1,2,4")


def test_blocks_that_are_not_told_follow_from_the_memory(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "machine", meta={"kv_cache": {}})
    with pytest.raises(TraceError, match=r"npu_mem is needed, as meta.json has no num_gpu_blocks"):
        validate_measured(path)
    machine = {"npu_mem": {"mem_size": 24, "mem_util": 0.9}}
    (path / "llmservingsim-config.json").write_text(json.dumps({"nodes": [{"instances": [machine]}]}))
    config = instance_config(read_measured_folder(path), MODEL)
    # 24 GiB * 0.9 less 16.06 GB of weights, in blocks of 16 tokens of 128 KiB, and one of them for padding.
    assert config.num_kv_blocks == int((24 * 2**30 * 0.9 - MODEL.weight_bytes()) / (16 * 2**17)) - 1
    assert config.max_model_len == MODEL.max_position


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arrival_time": None}, "line 2: arrival_time is None, a number above 0"),
        ({"input_toks": 0}, "line 2: input_toks is 0"),
        ({"output_toks": 2.5}, "integers are accepted"),
        ({"first_token_ts": 6.0}, "rising times are accepted"),
        ({"queued_ts": True}, "queued_ts is True"),
    ],
)
def test_a_bad_request_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    requests = [REQUESTS[0], {**REQUESTS[1], **change}, REQUESTS[2]]
    with pytest.raises(TraceError, match=told):
        validate_measured(write_folder(tmp_path / "machine", requests=requests))


def test_a_folder_without_its_files_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "machine")
    (folder / "vllm" / "meta.json").write_text("[]")
    with pytest.raises(TraceError, match="holds a JSON list"):
        validate_measured(folder)
    (folder / "vllm" / "requests.jsonl").unlink()
    (folder / "vllm" / "meta.json").unlink()
    with pytest.raises(TraceError, match=r"meta.json: cannot be read"):
        validate_measured(folder)


def test_instances_without_experts_are_runs_of_their_own(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "machine", meta={"engine_kwargs": {"data_parallel_size": 2}})
    with pytest.raises(TraceError, match="data_parallel_size is 2; more than 1 is accepted where"):
        validate_measured(path)


@pytest.mark.skipif("XLLM_LAB_DATA" not in os.environ, reason="XLLM_LAB_DATA names no folder")
@pytest.mark.parametrize(
    ("name", "most_error_frac"), [("RTX4090-Llama-3.1-8B", 0.005), ("RTXPRO6000-Llama-3.1-8B", 0.025)]
)
def test_measured_machines(name: str, most_error_frac: float) -> None:
    folder = Path(os.environ["XLLM_LAB_DATA"]) / "measured" / name
    if not folder.exists():
        pytest.skip(f"{folder} does not exist")
    found: MeasuredValidation = validate_measured(folder)
    told = read_measured_folder(folder).reference_ms
    for row in found.rows:
        # The summary is printed to a tenth of a millisecond: ours is the same metric, or this would be seen.
        assert row.measured_ms == pytest.approx(told[row.metric, row.statistic][0], abs=0.051)
    assert found.mean_abs_error_frac < most_error_frac
    assert found.extrapolated_frac < 0.05


GROUP = {
    "engine_kwargs": {"max_num_seqs": 8, "data_parallel_size": 2, "enable_expert_parallel": True},
    "kv_cache": {"num_gpu_blocks": 400, "block_size": 16},
}
MACHINE = {"link_bw": 16, "link_latency": 20000}


def write_group(path: Path, *, meta: dict[str, Any] | None = None, tensor_parallel: int = 1) -> Path:
    """A mixture of experts on two instances, with a table of experts for one device."""
    folder = write_folder(path, meta=meta or GROUP)
    shutil.rmtree(folder / "profile")
    write_bundle(folder / "profile", model="Qwen/Qwen3-30B-A3B", more={"qk_norm": 3.0}, tensor_parallel=tensor_parallel)
    write_experts(folder / "profile" / f"tp{tensor_parallel}" / "moe.csv")
    (folder / "llmservingsim-config.json").write_text(json.dumps(MACHINE))
    return folder


def test_a_measured_group_is_simulated_as_one(tmp_path: Path) -> None:
    """Two instances behind vLLM's router, which share the experts: neither is a run of its own."""
    group = validate_measured(write_group(tmp_path / "group"))
    assert len(group.rows) == len(METRICS) * len(STATISTICS)
    assert group.extrapolated_frac == 0
    alone = {**GROUP, "engine_kwargs": {"max_num_seqs": 8}}
    single = validate_measured(write_group(tmp_path / "single", meta=alone))
    ours = [{(r.metric, r.statistic): r.ours_ms for r in found.rows} for found in (group, single)]
    # Requests that do not meet: half of the experts to read, and 20 us twice a layer.
    assert ours[0]["TPOT", "median"] != ours[1]["TPOT", "median"]


def test_the_blocks_that_are_told_are_those_of_all_instances(tmp_path: Path) -> None:
    folder = read_measured_folder(write_group(tmp_path / "group"))
    assert instance_config(folder, known_model("qwen3-30b-a3b")).num_kv_blocks == 400 // 2 - 1


def test_a_group_of_tensor_parallel_instances_is_simulated(tmp_path: Path) -> None:
    meta = {**GROUP, "engine_kwargs": {**GROUP["engine_kwargs"], "tensor_parallel_size": 2}}
    assert validate_measured(write_group(tmp_path / "group", meta=meta, tensor_parallel=2)).num_preemptions == 0


def test_a_group_has_the_links_of_its_card_where_none_are_told(tmp_path: Path) -> None:
    folder = write_group(tmp_path / "group")
    assert validate_measured(folder).links_of is None
    (folder / "llmservingsim-config.json").unlink()
    meta = folder / "profile" / "meta.yaml"
    meta.write_text(meta.read_text().replace("test-device", "RTXPRO6000"))
    assert validate_measured(folder).links_of == "rtx-pro-6000"
    meta.write_text(meta.read_text().replace("RTXPRO6000", "ABACUS"))
    with pytest.raises(TraceError, match=r"link_bw .* are needed, as the links of 'ABACUS'"):
        validate_measured(folder)

"""Simulate what a measured machine served, and put the two beside each other. Nothing is fitted to the answers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xllm_lab.errors import ConfigError, TraceError
from xllm_lab.hardware import Link, hardware
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.known_models import known_model
from xllm_lab.model_spec import ModelSpec, read_model_spec
from xllm_lab.policies.batch.vllm import Vllm
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets
from xllm_lab.records import Records
from xllm_lab.sim.cost.collectives import Collectives, collectives
from xllm_lab.sim.cost.exchanges import Links
from xllm_lab.sim.cost.profile_bundle import read_bundle
from xllm_lab.sim.cost.profiled import ProfiledCost
from xllm_lab.sim.group import GroupTiming, Waves, fleet_of_group
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.sim.validate.measured_folder import METRICS, STATISTICS, MeasuredFolder, read_measured_folder
from xllm_lab.sim.validate.shared_prefixes import SharedPrefix, known_prefixes, prefixes_of_file, prompts_that_share
from xllm_lab.workload import Request, RequestId, Workload

_Ms = npt.NDArray[np.float64]
_TAKE: tuple[Callable[[_Ms], float], ...] = (
    lambda ms: float(ms.mean()),
    lambda ms: float(np.median(ms)),
    *(lambda ms, q=q: float(np.percentile(ms, q)) for q in (90, 95, 99)),
)


class Row(NamedTuple):
    """One statistic of one metric, in milliseconds.

    Attributes:
        reference_ms: what LLMServingSim says; None if the folder does not tell.
    """

    metric: str
    statistic: str
    measured_ms: float
    ours_ms: float
    reference_ms: float | None

    @property
    def error_frac(self) -> float:
        return self.ours_ms / self.measured_ms - 1.0

    @property
    def reference_error_frac(self) -> float | None:
        return None if self.reference_ms is None else self.reference_ms / self.measured_ms - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredValidation:
    """One folder's rows.

    Attributes:
        extrapolated_frac: of the simulated steps, those outside the profile's tables.
        num_shared_prompts: prompts known to begin as an earlier one does.
        links_of: the device whose figures the links between devices have, where the folder does not tell; else None.
    """

    folder: Path
    rows: tuple[Row, ...]
    extrapolated_frac: float
    num_preemptions: int
    num_shared_prompts: int
    links_of: str | None

    @property
    def mean_abs_error_frac(self) -> float:
        return float(np.mean([abs(r.error_frac) for r in self.rows]))

    def as_dict(self) -> dict[str, Any]:
        """For JSON, the errors included."""
        rows = [
            {**r._asdict(), "error_frac": r.error_frac, "reference_error_frac": r.reference_error_frac}
            for r in self.rows
        ]
        return {**asdict(self), "rows": rows, "mean_abs_error_frac": self.mean_abs_error_frac}


def validate_measured(
    path: Path, *, model_config: Path | None = None, workload_file: Path | None = None
) -> MeasuredValidation:
    """Simulate the requests of one folder with its profile.

    Args:
        model_config: a transformers `config.json`, if the model is none of `known_models`.
        workload_file: what was replayed, for the prompts' tokens; else see `known_prefixes`.

    Raises:
        TraceError, ProfileError, ModelError: something in the folder cannot be read or used.
    """
    folder = read_measured_folder(path)
    tensor, data = (int(folder.engine_argument(f"{name}_parallel_size", 1)) for name in ("tensor", "data"))
    bundle = read_bundle(folder.profile, tensor, tensor * data)
    model = known_model(bundle.model) if model_config is None else read_model_spec(model_config)
    config = instance_config(folder, model)
    policies = Policies(Vllm(), shapes=shapes_policy(folder))
    group = _group_size(folder, model)
    num_devices = bundle.tensor_parallel * group
    spread = num_devices if folder.engine_argument("enable_expert_parallel", False) else 1
    links, links_of = _links(folder, num_devices, bundle.hardware)
    cost = ProfiledCost(bundle, model, links=links, data_parallel=group, expert_parallel=spread)
    shared = _shared(folder, config.block_size, workload_file)
    requests = workload(folder, shared, config.block_size)
    timing = Predicted(cost)
    records = run_simulation(
        requests,
        config,
        policies,
        timing,
        vocab_size=model.vocab_size,
        fleet=fleet_of_group(group) if group > 1 else None,
        group=GroupTiming(group, cost, Waves()) if group > 1 else None,
    )
    return MeasuredValidation(
        folder=path,
        rows=_rows(folder, records),
        extrapolated_frac=timing.extrapolated_frac,
        num_preemptions=sum(r.num_preemptions for r in records.requests),
        num_shared_prompts=len(shared),
        links_of=links_of,
    )


def _group_size(folder: MeasuredFolder, model: ModelSpec) -> int:
    """Instances that share their experts; 1 if there is one instance."""
    size = int(folder.engine_argument("data_parallel_size", 1))
    if size > 1 and not model.experts:
        raise TraceError(
            f"{folder.path / 'vllm' / 'meta.json'}: data_parallel_size is {size}; more than 1 is accepted where the "
            "instances share experts, others are runs of their own"
        )
    return size


def workload(folder: MeasuredFolder, shared: Sequence[SharedPrefix], block_size: int) -> Workload:
    """The folder's requests when they came. It does not tell their tokens, only `shared` ones are equal."""
    prompts = prompts_that_share([r.prompt_tokens for r in folder.requests], shared, block_size)
    return Workload(
        requests=tuple(
            Request(
                id=RequestId(i),
                arrival_us=round(r.arrival_s * 1e6),
                prompt=prompts[i],
                output_tokens=r.output_tokens,
            )
            for i, r in enumerate(folder.requests)
        ),
        source=str(folder.path),
    )


def instance_config(folder: MeasuredFolder, model: ModelSpec) -> InstanceConfig:
    """The instance as vLLM ran it; what the folder does not tell is vLLM's default."""
    block_size = int(folder.meta.get("kv_cache", {}).get("block_size") or 16)
    return InstanceConfig(
        max_tokens_per_batch=int(folder.engine_argument("max_num_batched_tokens", 2048)),
        max_seqs_per_batch=int(folder.engine_argument("max_num_seqs", 256)),
        block_size=block_size,
        # vLLM keeps one block for padding (`BlockPool.null_block`).
        num_kv_blocks=_gpu_blocks(folder, model, block_size) - 1,
        enable_prefix_cache=bool(folder.meta.get("kv_cache", {}).get("enable_prefix_caching", True)),
        max_model_len=int(folder.engine_argument("max_model_len", model.max_position)),
        # vLLM 0.19 plans ahead unless it is told not to; where a benchmark wrote it down, that holds.
        async_scheduling="length_aware" if folder.resolved("scheduler_config", "async_scheduling", True) else "off",
    )


def _shared(folder: MeasuredFolder, block_size: int, workload_file: Path | None) -> tuple[SharedPrefix, ...]:
    checksum = folder.meta.get("dataset_hash")
    if workload_file is None:
        return known_prefixes(checksum, block_size)
    lengths = [r.prompt_tokens for r in folder.requests]
    return prefixes_of_file(workload_file, block_size, checksum=checksum, lengths=lengths)


def shapes_policy(folder: MeasuredFolder) -> ShapesPolicy:
    """Which steps ran in graphs; where the folder does not tell, vLLM's default."""
    if folder.resolved("model_config", "enforce_eager", False):
        return EAGER
    sizes = folder.resolved("compilation_config", "cudagraph_capture_sizes", None)
    return VllmBuckets(cudagraph_capture_sizes=",".join(map(str, sizes)) if isinstance(sizes, list) else "")


def _gpu_blocks(folder: MeasuredFolder, model: ModelSpec, block_size: int) -> int:
    """Of one instance."""
    group = _group_size(folder, model)
    told = folder.meta.get("kv_cache", {}).get("num_gpu_blocks")
    if told:
        # vLLM's front end adds up what its instances have (`MPClient`, as each says that it is ready).
        return int(told) // group
    # Memory times utilisation, less the weights: an upper bound, as activations and the context of the driver are
    # not known. It matters only to a run that fills it.
    memory = _machine(folder, "npu_mem")
    devices = int(folder.engine_argument("tensor_parallel_size", 1))
    weights = model.weight_bytes()
    if model.experts is not None:  # each instance of a group has its share of the experts
        e = model.experts
        of_experts = 2.0 * e.params_per_expert * e.num_experts * e.num_layers
        weights -= of_experts * (1 - 1 / group)
    free = float(memory["mem_size"]) * 2**30 * float(memory["mem_util"]) * devices - weights
    return max(2, int(free / (model.kv_bytes_per_token() * block_size)))


def _links(folder: MeasuredFolder, num_devices: int, card: str) -> tuple[Links | None, str | None]:
    """The folder's, or those of a known device, and which."""
    if num_devices == 1:
        return None, None
    gb_per_s, latency_ns = folder.config.get("link_bw"), folder.config.get("link_latency")
    if gb_per_s and latency_ns is not None:
        link = Link(
            bytes_per_s=float(gb_per_s) * 1e9, latency_us=float(latency_ns) / 1e3, num_devices=num_devices, frac=1.0
        )
        return lambda size: Collectives(size, link, kernel_us=0.0), None
    try:
        device = hardware(card)
    except ConfigError:
        raise TraceError(
            f"{folder.path / 'llmservingsim-config.json'}: link_bw (GB/s) and link_latency (ns) are needed, as the "
            f"links of {card!r}, which the profile is of, are not known"
        ) from None
    return partial(collectives, device), device.name


def _machine(folder: MeasuredFolder, name: str) -> dict[str, float]:
    try:
        found = folder.config["nodes"][0]["instances"][0][name]
        return {key: float(value) for key, value in found.items()}
    except (LookupError, TypeError, ValueError):
        where = folder.path / "llmservingsim-config.json"
        raise TraceError(
            f"{where}: nodes[0].instances[0].{name} is needed, as meta.json has no num_gpu_blocks"
        ) from None


def _rows(folder: MeasuredFolder, records: Records) -> tuple[Row, ...]:
    measured = _metrics(
        [(r.queued_s * 1e3, r.first_token_s * 1e3, r.last_token_s * 1e3, r.output_tokens) for r in folder.requests]
    )
    ours = _metrics(_lives(records))
    rows = []
    for metric in METRICS:
        for statistic, take in zip(STATISTICS, _TAKE, strict=True):
            reference = folder.reference_ms.get((metric, statistic))
            rows.append(
                Row(metric, statistic, take(measured[metric]), take(ours[metric]), reference[1] if reference else None)
            )
    return tuple(rows)


def _lives(records: Records) -> list[tuple[float, float, float, int]]:
    """(queued, first token, last token in ms, output tokens) of each request: a plan sees it at the start of a step."""
    starts_of: dict[int, list[int]] = {}
    for step in records.steps:
        starts_of.setdefault(step.instance, []).append(step.start_us)
    lives = []
    for r in records.requests:
        assert r.instance is not None, f"request {r.id} was on no instance"
        starts_us = starts_of[r.instance]
        assert r.token_times_us, f"request {r.id} got no token, though its folder says that it fits"
        queued_us = starts_us[bisect_left(starts_us, r.arrival_us)]
        lives.append((queued_us / 1e3, r.token_times_us[0] / 1e3, r.token_times_us[-1] / 1e3, r.output_tokens))
    return lives


def _metrics(lives: Sequence[tuple[float, float, float, int]]) -> dict[str, _Ms]:
    """Of (queued, first token, last token in ms, output tokens): each metric, shape [requests]; TPOT of two or more."""
    queued, first, last, tokens = (np.array(column) for column in zip(*lives, strict=True))
    several = tokens > 1
    tpot = (last - first)[several] / (tokens - 1)[several]
    return dict(zip(METRICS, (first - queued, tpot, last - queued), strict=True))

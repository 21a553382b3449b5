"""Loads of experts as they come, for a simulated machine: what an experts policy balances, and what it is worth."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from xllm_lab.errors import ConfigError, TraceError
from xllm_lab.expert_records import EXPERT_LOADS_FILE, EXPERTS_FILE
from xllm_lab.rebalancing import ExpertLayout, layout_from, placements
from xllm_lab.runs import Run, read_run
from xllm_lab.sim.experts.loads import load
from xllm_lab.sim.experts.serving import Popularity, ServedExperts, popularity_of, recorded_popularity
from xllm_lab.sim.machine import Machine

_OPTIONS = ("bytes_per_s", "row_us", "activation_us")
# What of a run is read.
_READ = ("manifest.json", "steps.parquet", EXPERTS_FILE, EXPERT_LOADS_FILE)


def with_expert_trace(machine: Machine, spec: str) -> Machine:
    """The same machine, whose experts have such loads. A cost model that prices routings prices these from now on.

    Args:
        spec: a run folder whose experts were divided, or a file of loads (`sim.experts.loads`); and, after a "?", any
            of bytes_per_s=RATE at which a device receives weights, row_us=TIME of a row more on the most loaded device,
            where the cost model knows nothing of that, and activation_us=TIME that a change holds a step up.

    Raises:
        ConfigError: a machine or a run without divided experts, or numbers that are none.
        TraceError: no loads.
        RunError: no run.
    """
    place, _, rest = spec.partition("?")
    given = _numbers(spec, rest)
    if machine.group is not None:
        raise ConfigError("loads of experts for a data-parallel group, whose places are not moved; accepted: --alike")
    path = Path(place)
    run = read_run(path) if path.is_dir() else None
    own = machine.expert_layout
    if run is not None:
        layout, popularity, per_token = _of_run(run)
        if own is not None:
            layout, per_token = _same_experts(own, layout), machine.experts_per_token
    else:
        loads = load(path)
        popularity, per_token = popularity_of(loads), machine.experts_per_token
        if own is None:
            raise ConfigError(
                f"{place}: loads of experts, and the machine has none that are divided; accepted: a model with experts "
                "under expert parallelism, or a run of an engine whose experts were"
            )
        layout = _same_experts(own, replace(own, layers=tuple(range(loads.num_layers)), num_experts=loads.num_experts))
    rate = given.get("bytes_per_s", machine.expert_link_bytes_per_s or _recorded_rate(run, layout))
    if rate is None:
        raise ConfigError(f"{spec}: at which rate experts are copied is not known; accepted: with ?bytes_per_s=RATE")
    experts = ServedExperts(
        layout=replace(layout, copy_us=layout.expert_bytes / rate * 1e6),
        popularity=popularity,
        experts_per_token=per_token,
        # One of alike instances has its own tokens; experts have those of all.
        num_alike=1 if own is None else machine.data_parallel,
        link_bytes_per_s=rate,
        row_us=given.get("row_us", 0.0),
        activation_us=round(given.get("activation_us", 0.0)),
        route=getattr(machine.cost, "route", None),
    )
    return replace(machine, experts=experts, timing={**machine.timing, "expert_trace": spec, **experts.described()})


def checksum(spec: str) -> str:
    """SHA-256 of what such a trace holds; TraceError or RunError if there is none."""
    path = Path(spec.partition("?")[0])
    files = [path]
    if path.is_dir():
        folder = read_run(path).path
        files = [file for name in _READ if (file := folder / name).exists()]
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise TraceError(f"{file}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _numbers(spec: str, rest: str) -> Mapping[str, float]:
    given = dict[str, float]()
    for part in filter(None, rest.split("&")):
        name, _, value = part.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            given[name] = math.nan
        if name not in _OPTIONS or not given[name] >= 0:
            raise ConfigError(
                f"{spec}: {part!r} is not accepted; accepted: {', '.join(_OPTIONS)}, numbers of at least 0"
            )
    return given


def _of_run(run: Run) -> tuple[ExpertLayout, Popularity, int]:
    told = run.manifest.expert_layout
    if told is None:
        raise ConfigError(f"{run.path}: its experts were not divided; accepted: a run with expert parallelism")
    layout = layout_from(told)
    lay = placements(layout, told["num_redundant_experts"], run.decisions)
    popularity = recorded_popularity(run.expert_loads, lay)
    num_rows = sum(int(record.slot_tokens_LP[0].sum()) for record in run.expert_loads)
    num_tokens = sum(sum(step.num_tokens) for step in run.records.steps)
    # How many slots a device has is the policy's to say.
    return replace(layout, num_redundant_experts=None), popularity, max(1, round(num_rows / max(1, num_tokens)))


def _same_experts(own: ExpertLayout, other: ExpertLayout) -> ExpertLayout:
    """The machine's layout, of the other's layers, which stand for all; ConfigError if they are of other experts."""
    if own.num_experts != other.num_experts:
        raise ConfigError(f"loads of {other.num_experts} experts a layer, the model has {own.num_experts}")
    per_layer = len(own.layers) / len(other.layers)
    return replace(own, layers=other.layers, expert_bytes=round(own.expert_bytes * per_layer))


def _recorded_rate(run: Run | None, layout: ExpertLayout) -> float | None:
    """At which each device received weights in a run, from decision to readiness."""
    known = [] if run is None else [d for d in run.decisions if d.ready_us is not None and d.ready_us > d.decided_us]
    if not known:
        return None
    total_us = sum(d.ready_us - d.decided_us for d in known if d.ready_us is not None)
    return sum(d.copied_bytes for d in known) / layout.num_devices / total_us * 1e6

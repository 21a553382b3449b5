"""The verb `profile`: what a profiler recorded, for a terminal; or this machine's own operators, measured."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from xllm_lab import verbs
from xllm_lab.errors import ConfigError
from xllm_lab.profiles import Profile, read_profile
from xllm_lab.profiles.profile import CollectiveRow
from xllm_lab.profiles.steps import Steps, steps
from xllm_lab.profiles.transfer_time import fit_collective
from xllm_lab.text import table
from xllm_lab.wording import compact, percent

TOP = 20


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        nargs="?",
        help="what `import` accepts; without it, the engine is measured",
    )
    parser.add_argument("--source", help="which profiler; else found from what is there")
    parser.add_argument("--top", type=int, default=TOP, metavar="N", help="operators and collectives to show")
    parser.add_argument("--kv-block-tokens", type=int, metavar="N", help="of the profiled engine; to estimate lengths")
    parser.add_argument("--out", type=Path, help="of the engine: the bundle, a new folder")
    group = parser.add_argument_group("engine", "measured here, for `simulate --profile`")
    for name, what in _ENGINE.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=type(what.default), help=what.told, metavar=what.metavar)


class _Option(NamedTuple):
    default: str | int
    told: str
    metavar: str | None = None


_ENGINE = {
    "model": _Option("smollm2-135m", "a name, a folder with config.json, or a .gguf file"),
    "device": _Option("auto", "cpu, cuda, npu or auto"),
    "dtype": _Option("auto", "float32, bfloat16 or auto"),
    "threads": _Option(1, "of a CPU", "N"),
    "timer": _Option("wall", "wall or cpu time"),
    "most_tokens": _Option(1024, "of a step's prompts", "N"),
    "most_seqs": _Option(64, "decodes in a step", "N"),
    "most_kv_tokens": _Option(2048, "of one sequence", "N"),
    "repeats": _Option(3, "steps of each shape", "N"),
}


def measured(o: argparse.Namespace) -> dict[str, dict[int, float]]:
    """The engine's operators, measured and written to `--out`: operator -> tokens or sequences -> microseconds."""
    if o.source is not None or o.kv_block_tokens is not None:
        raise ConfigError("--source and --kv-block-tokens are of a profiler's folder; accepted: with its path")
    if o.out is None:
        raise ConfigError("no path and no --out; accepted: a profiler's folder, or --out DIR to measure the engine")
    given = {name: getattr(o, name) for name in _ENGINE if getattr(o, name) is not None}
    return verbs.profile_engine(out=o.out, **{name: what.default for name, what in _ENGINE.items()} | given)


def measured_text(times: dict[str, dict[int, float]], out: Path) -> str:
    """A row for each operator: microseconds of a call at the smallest and at the largest size."""
    rows = []
    for operator, by_size in times.items():
        sizes = (min(by_size), max(by_size))
        rows.append([operator, *(f"{size:,}" for size in sizes), *(compact(by_size[size]) for size in sizes)])
    return f"{table(['', 'smallest', 'largest', 'us', 'us'], rows)}\n{out}"


def opened(o: argparse.Namespace) -> tuple[Profile, Steps]:
    """The profile that the options name."""
    if o.top < 1:
        raise ConfigError(f"--top is {o.top}, at least 1 is accepted")
    if o.out is not None:
        raise ConfigError(f"--out beside {o.path}, which is only shown; accepted: `xllm-lab import` to keep it")
    if given := [f"--{name.replace('_', '-')}" for name in _ENGINE if getattr(o, name) is not None]:
        raise ConfigError(f"{', '.join(given)} beside {o.path}, which was measured already; accepted: one or the other")
    profile = read_profile(o.path, source=o.source)
    return profile, steps(profile, kv_block_tokens=o.kv_block_tokens)


def as_dict(profile: Profile, found: Steps) -> dict[str, Any]:
    """All that was read, as JSON holds it; batches by how many there are."""
    value = asdict(profile)
    del value["batches"], value["forwards"], value["requests"]
    return {
        **value,
        "operators": [asdict(row) for row in profile.operators.rows],
        "num_batches": len(profile.batches),
        "num_forwards": len(profile.forwards),
        "num_requests": len(profile.requests),
        "num_samples": dict(found.num_by_basis),
        "left_out": [asdict(left) for left in (*profile.left_out, *found.left_out)],
    }


def as_text(profile: Profile, found: Steps, top: int = TOP) -> str:
    """The sections that the profile has something for."""
    marked = f", {profile.num_steps:,} steps" if profile.num_steps else ""
    parts = [f"{profile.path}: {profile.source}{marked}"]
    parts += [f"{title}\n{body}" for title, body in _sections(profile, found, top) if body]
    return "\n\n".join(parts)


def _sections(profile: Profile, found: Steps, top: int) -> Iterator[tuple[str, str]]:
    yield "operators", _operators(profile, top)
    yield "collectives", _collectives(profile, top)
    yield "links", _links(profile)
    yield "where the time of a step goes", _splits(profile)
    yield "on the host", _host(profile, top)
    yield "batches", _batches(profile, found)
    yield "requests", _requests(profile)
    left = [
        [f"{left.file}: {left.reason}", f"{left.num_rows:,}", compact(left.total_us / 1e3)]
        for left in (*profile.left_out, *found.left_out)
    ]
    yield "not used", table(["", "rows", "ms"], left) if left else ""
    yield "notes", "\n".join(profile.notes)


def _operators(profile: Profile, top: int) -> str:
    by_operator = profile.operators.by_operator()
    whole = by_operator.total_us + math.fsum(row.total_us for row in profile.collectives)
    rows = [
        [
            *(row.operator, row.core, f"{row.num_calls:,}", compact(row.total_us / 1e3), percent(row.total_us / whole)),
            *map(compact, (row.mean_us, row.min_us, row.max_us)),
        ]
        for row in by_operator.rows
        if whole > 0
    ]
    return _first(["", "core", "calls", "ms", "of time", "mean us", "min", "max"], rows, top)


def _collectives(profile: Profile, top: int) -> str:
    rows = [
        [
            *(row.collective, row.device or "-", row.group or "-", str(row.num_ranks or "-")),
            "-" if row.message_bytes is None else f"{row.message_bytes:,}",
            *(f"{row.num_calls:,}", compact(row.total_us / 1e3), *map(compact, (row.mean_us, row.min_us, row.max_us))),
        ]
        for row in profile.collectives
    ]
    return _first(["", "device", "group", "ranks", "bytes", "calls", "ms", "mean us", "min", "max"], rows, top)


def _links(profile: Profile) -> str:
    """Of each collective that was measured at several sizes."""
    kinds: dict[tuple[str, int | None], list[CollectiveRow]] = {}
    for row in profile.collectives:
        if row.message_bytes is not None:
            kinds.setdefault((row.collective, row.num_ranks), []).append(row)
    rows = []
    for (collective, num_ranks), measured in kinds.items():
        if len({row.message_bytes for row in measured}) > 1:
            rows.append([collective, str(num_ranks or "-"), *_link(measured)])
    return table(["", "ranks", "latency us", "GB/s of the message"], rows) if rows else ""


def _link(measured: list[CollectiveRow]) -> tuple[str, str]:
    try:
        link = fit_collective(measured)
    except ConfigError:  # the times are told above, and say why
        return "-", "-"
    return compact(link.latency_us), compact(link.bytes_per_s / 1e9)


def _splits(profile: Profile) -> str:
    """Means over steps and devices."""
    splits = profile.splits
    whole = math.fsum(split.step_us for split in splits)
    if not whole:
        return ""
    sums = {
        "computing": math.fsum(split.computing_us for split in splits),
        "communication not overlapped": math.fsum(split.not_overlapped_us for split in splits),
        "free": math.fsum(split.free_us for split in splits),
    }
    rows = [[name, compact(us / 1e3 / len(splits)), percent(us / whole)] for name, us in sums.items()]
    rows.append(["step", compact(whole / 1e3 / len(splits)), f"{len(splits)} rows"])
    hidden = math.fsum(split.overlapped_us for split in splits)
    return table(["", "mean ms", ""], [*rows, ["communication overlapped", compact(hidden / 1e3 / len(splits)), ""]])


def _host(profile: Profile, top: int) -> str:
    rows = [
        [row.operator, f"{row.num_calls:,}", compact(row.host_us / 1e3), compact(row.device_us / 1e3)]
        for row in profile.host_operators
    ]
    return _first(["", "calls", "host ms", "device ms"], rows, top)


def _batches(profile: Profile, found: Steps) -> str:
    lines = []
    if profile.batches:
        mean_us = math.fsum(batch.step_us for batch in profile.batches) / len(profile.batches)
        lines.append(f"{len(profile.batches):,} executed, {compact(mean_us / 1e3)} ms in the mean")
        lines += [f"{num:,} to learn step times from: {basis}" for basis, num in sorted(found.num_by_basis.items())]
    if profile.forwards:
        busy_us = math.fsum(forward.step_us for forward in profile.forwards)
        idle_us = math.fsum(forward.idle_us or 0 for forward in profile.forwards)
        told = (
            f"{len(profile.forwards):,} forward passes, {compact(busy_us / 1e3 / len(profile.forwards))} ms in the mean"
        )
        lines.append(f"{told}, {compact(idle_us / 1e3)} ms idle between them")
    if profile.peak_used_blocks is not None:
        lines.append(f"{profile.peak_used_blocks:,} of {profile.num_blocks or '?'} KV blocks in use at most")
    return "\n".join(lines)


def _requests(profile: Profile) -> str:
    if not profile.requests:
        return ""
    num = len(profile.requests)
    prompt, output = (
        sum(getattr(r, f"{kind}_tokens") for r in profile.requests) / num for kind in ("prompt", "output")
    )
    e2e_us = math.fsum(request.e2e_us for request in profile.requests) / num
    return f"{num:,}, in the mean {compact(prompt)} tokens in, {compact(output)} out, {compact(e2e_us / 1e6)} s"


def _first(head: list[str], rows: list[list[str]], top: int) -> str:
    if not rows:
        return ""
    more = f"\n{len(rows) - top} more" if len(rows) > top else ""
    return table(head, rows[:top]) + more

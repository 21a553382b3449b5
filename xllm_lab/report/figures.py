"""One function per figure. Each takes records and returns a drawing, or None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from xllm_lab.metrics import e2e_us, is_served, tpot_us, ttft_us
from xllm_lab.records import Records, RequestRecord
from xllm_lab.report.drawing import (
    ALARM,
    ENGINE,
    ENGINE_PALE,
    NEUTRAL,
    NEUTRAL_PALE,
    SIMULATOR,
    SIMULATOR_PALE,
    Drawing,
    draw,
    legend_above,
)
from xllm_lab.report.series import Timeline, cumulative, preemptions, step_tokens
from xllm_lab.runs import Run

_SMALL = (275, 215)
_WIDE = 380


class Hue(NamedTuple):
    """A host's colour, and its pale companion for areas."""

    full: str
    pale: str


HUES = {"engine": Hue(ENGINE, ENGINE_PALE), "simulator": Hue(SIMULATOR, SIMULATOR_PALE)}

_LATENCIES: dict[str, tuple[Callable[[RequestRecord], float | None], str]] = {
    "TTFT": (ttft_us, "ttft_slo_us"),
    "TPOT": (tpot_us, "tpot_slo_us"),
    "E2E": (e2e_us, "e2e_slo_us"),
}


def latency_cdfs(runs: Sequence[Run]) -> Drawing | None:
    """Distributions of TTFT, TPOT and E2E over served requests, a curve per run."""
    svgs = []
    for name, (latency, slo) in _LATENCIES.items():
        curves = [(run.manifest.host, _served(run.records, latency)) for run in runs]
        curves = [(host, values) for host, values in curves if values]
        promises = {getattr(r, slo) for run in runs for r in run.records.requests}
        promise_us = promises.pop() if len(promises) == 1 else None
        if curves:
            svgs.append(draw(f"cdf-{name.lower()}", *_SMALL, _cdf_painter(name, curves, promise_us)))
    caption = "Latency of served requests: where the curves lie on each other, the simulator predicts the engine"
    if all(run.manifest.host == runs[0].manifest.host for run in runs):
        caption = "Latency of served requests: the further left a curve reaches 1, the fewer requests waited long"
    promised = "; a dashed line is the promise that every request carries" if _has_promise(runs) else ""
    return Drawing(tuple(svgs), f"{caption}{promised}.") if svgs else None


def batch_composition(runs: Mapping[str, Run]) -> Drawing | None:
    """Tokens per step, split into prompt and decode; requests running and waiting. A panel per run."""
    busy = {title: run for title, run in runs.items() if run.records.steps}
    if not busy:
        return None
    pictures = {title: _Batches(run.records) for title, run in busy.items()}
    limits = [max(p.peak(k) for p in pictures.values()) * room for k, room in enumerate((1.5, 1.05))]
    end_s = max(p.line.end_s for p in pictures.values())

    def painter(title: str) -> Callable[[list[Axes]], None]:
        def paint(axes: list[Axes]) -> None:
            _paint_batches(axes, title, pictures[title], HUES[busy[title].manifest.host])
            for axis, limit in zip(axes, limits, strict=True):
                axis.set_ylim(0, limit)
                axis.set_xlim(0, end_s)

        return paint

    svgs = [draw(f"batch-{k}", _WIDE, 330, painter(title), nrows=2, sharex=True) for k, title in enumerate(pictures)]
    return Drawing(
        tuple(svgs),
        "What steps are made of: prompt peaks hold up the requests that decode, and a waiting line that does not "
        "come down again is overload (means over equal slices of time; gaps are idle).",
    )


def kv_use(runs: Mapping[str, Run]) -> Drawing | None:
    """KV blocks used, idle (cached) and free over time, preemptions marked. A panel per run."""
    busy = {title: run for title, run in runs.items() if run.records.steps}
    if not busy:
        return None
    end_s = max(Timeline(run.records.steps).end_s for run in busy.values())

    def painter(title: str, run: Run) -> Callable[[list[Axes]], None]:
        def paint(axes: list[Axes]) -> None:
            num_blocks = run.manifest.instance_config().num_kv_blocks
            _paint_kv(axes[0], run.records, num_blocks, HUES[run.manifest.host])
            axes[0].set_title(title, loc="left")
            axes[0].set_xlim(0, end_s)

        return paint

    svgs = [draw(f"kv-{k}", _WIDE, 220, painter(*pair)) for k, pair in enumerate(busy.items())]
    full = "once nothing is free or idle, requests lose their KV and are computed again"
    marked = " (red marks)" if any(s.preempted for run in busy.values() for s in run.records.steps) else ""
    return Drawing(tuple(svgs), f"KV blocks in use, cached for later (idle) and free: {full}{marked}.")


class _Batches:
    """What `batch_composition` shows of one run."""

    def __init__(self, records: Records) -> None:
        prompts = {int(r.id): r.prompt_tokens for r in records.requests}
        tokens = [step_tokens(s, prompts) for s in records.steps]
        self.line = Timeline(records.steps)
        self.prompt = self.line.mean([t.prompt for t in tokens])
        self.decode = self.line.mean([t.decode for t in tokens])
        self.running = self.line.mean([len(s.ids) for s in records.steps])
        self.waiting = self.line.mean([s.num_waiting for s in records.steps])

    def peak(self, row: int) -> float:
        """Largest value in the upper (0) or lower (1) picture; at least 1."""
        shown = (self.prompt, self.decode) if row == 0 else (self.running, self.waiting)
        return max(1.0, *(float(np.nanmax(values)) for values in shown))


def _paint_batches(axes: list[Axes], title: str, picture: _Batches, hue: Hue) -> None:
    x, upper, lower = picture.line.middle_s, *axes
    upper.fill_between(x, 0, picture.prompt, color=hue.pale, linewidth=0, label="prompt")
    upper.plot(x, picture.decode, color=hue.full, linewidth=1.2, label="decode")
    upper.set_title(title, loc="left")
    upper.set_ylabel("tokens per step")
    # Prompts bring a hundred times the tokens of decoding; on a linear axis one of the two would not be seen.
    upper.set_yscale("symlog", linthresh=1)
    lower.plot(x, picture.running, color=hue.full, label="in the step")
    lower.plot(x, picture.waiting, color=NEUTRAL, linewidth=1.2, label="waiting")
    lower.set_ylabel("requests")
    lower.set_xlabel("time since start, s")
    lower.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    upper.yaxis.set_major_formatter("{x:,.0f}")
    for axis in axes:
        legend_above(axis)


def _paint_kv(axis: Axes, records: Records, num_blocks: int, hue: Hue) -> None:
    line = Timeline(records.steps)
    used = line.mean([s.num_used_blocks for s in records.steps])
    held = used + line.mean([s.num_idle_blocks for s in records.steps])
    axis.fill_between(line.middle_s, 0, used, color=hue.full, linewidth=0, label="used")
    axis.fill_between(line.middle_s, used, held, color=hue.pale, linewidth=0, label="idle")
    axis.fill_between(line.middle_s, held, num_blocks, color=NEUTRAL_PALE, linewidth=0, label="free")
    times, counts = preemptions(records)
    if times:
        axis.plot(times, [num_blocks] * len(times), "|", color=ALARM, markersize=9, label=f"{sum(counts)} preemptions")
    axis.set_ylim(0, num_blocks * 1.06)
    axis.set_ylabel("KV blocks")
    axis.set_xlabel("time since start, s")
    legend_above(axis)


def _cdf_painter(
    name: str, curves: Sequence[tuple[str, list[float]]], promise_us: int | None
) -> Callable[[list[Axes]], None]:
    low, high = (np.percentile([v for _, values in curves for v in values], q) for q in (5, 99))
    is_long = high / 1e6 >= 1
    unit = 1e6 if is_long else 1e3

    def paint(axes: list[Axes]) -> None:
        axis, seen = axes[0], set()
        for host, values in curves:
            x, y = cumulative([v / unit for v in values])
            label = "" if host in seen else host
            # Several engine runs show the engine's own spread, so they are thin and may overlap.
            width = 1.0 if sum(h == host for h, _ in curves) > 1 else 1.8
            axis.step(x, y, where="post", color=HUES[host].full, linewidth=width, label=label)
            seen.add(host)
        if promise_us is not None:
            axis.axvline(promise_us / unit, color=NEUTRAL, linestyle="--", linewidth=1, label="promise")
        if low > 0 and high / low > 30:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_xlim(left=0)
        axis.set_ylim(0, 1.02)
        axis.set_xlabel(f"{name}, {'s' if is_long else 'ms'}")
        axis.set_ylabel("fraction of requests")
        legend_above(axis)

    return paint


def _served(records: Records, latency: Callable[[RequestRecord], float | None]) -> list[float]:
    return [value for r in records.requests if is_served(r) and (value := latency(r)) is not None]


def _has_promise(runs: Sequence[Run]) -> bool:
    for _, slo in _LATENCIES.values():
        promises = {getattr(r, slo) for run in runs for r in run.records.requests}
        if len(promises) == 1 and promises != {None}:
            return True
    return False

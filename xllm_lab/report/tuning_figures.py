"""The figures about a search and its verification; as `figures.py`, one function per figure."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from xllm_lab.report.drawing import ALARM, ENGINE, NEUTRAL, SIMULATOR, SIMULATOR_PALE, Drawing, draw, legend_above
from xllm_lab.wording import signed_percent

if TYPE_CHECKING:  # they need optuna and torch, which a page without them does not
    from xllm_lab.tuning.gain import Gain
    from xllm_lab.tuning.study import Study, Trial

_SIZE = (380, 255)


def tuning_history(study: Study) -> Drawing:
    """Goodput of each trial in the order they were tried."""
    infeasible = [t for t in study.trials if not t.is_feasible]
    feasible = [t for t in study.trials if t.is_feasible]

    def paint(axes: list[Axes]) -> None:
        axis = axes[0]
        axis.plot(*_history(feasible), "o", color=SIMULATOR_PALE, markersize=4, label="trial")
        if infeasible:
            axis.plot(*_history(infeasible), "x", color=NEUTRAL, markersize=4, label="infeasible")
        if feasible:
            numbers, goodput = _history(feasible)
            numbers, best = [*numbers, len(study.trials) - 1], [*accumulate(goodput, max), max(goodput)]
            axis.step(numbers, best, where="post", color=SIMULATOR, label="best so far")
        default = study.default.goodput_per_s
        axis.axhline(default, color=NEUTRAL, linestyle="--", linewidth=1, label="default")
        axis.set_xlabel("trial")
        axis.set_ylabel("goodput, tokens per s")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        legend_above(axis)

    return Drawing(
        (draw("history", *_SIZE, paint),),
        "Tuning, simulated: a best-so-far line that has long been flat says that more trials would add little "
        f"({len(infeasible)} of {len(study.trials)} could not run or broke a constraint).",
    )


def pareto_front(study: Study) -> Drawing | None:
    """Goodput against P90 TTFT: what more of the one costs of the other."""
    from xllm_lab.tuning.study import ttft_p90_us

    def points(trials: list[Trial]) -> tuple[list[float], list[float]]:
        return [t.goodput_per_s for t in trials], [(ttft_p90_us(t) or 0.0) / 1e6 for t in trials]

    front = study.pareto()
    if not front:
        return None
    feasible = [t for t in study.trials if t.is_feasible and ttft_p90_us(t) is not None]

    def paint(axes: list[Axes]) -> None:
        axis = axes[0]
        axis.plot(*points(feasible), "o", color=SIMULATOR_PALE, markersize=4, label="trial")
        # A staircase: nothing was tried between two points, so nothing better than the right one is promised there.
        axis.plot(*points(front[::-1]), "o-", drawstyle="steps-pre", color=SIMULATOR, markersize=4.5, label="front")
        axis.plot(*points([study.best]), "*", color=SIMULATOR, markersize=13, label="chosen")
        axis.plot(*points([study.default]), "D", color=NEUTRAL, markersize=6, label="default")
        axis.set_xlabel("goodput, tokens per s")
        axis.set_ylabel("P90 TTFT, s")
        axis.set_ylim(bottom=0)
        legend_above(axis)

    return Drawing(
        (draw("pareto", *_SIZE, paint),),
        "What goodput costs, simulated: right and down is better, and no trial beats one on the front in both.",
    )


def verified_gain(gain: Gain) -> Drawing:
    """The paired replays on the engine, and the gain with its confidence interval."""

    def paint(axes: list[Axes]) -> None:
        _paint_pairs(axes[0], gain)
        if len(axes) > 1:
            _paint_interval(axes[1], gain)

    shape: dict[str, Any] = {} if gain.gain_frac is None else {"ncols": 2, "width_ratios": (3, 2)}
    said = "each line is a pair of replays of one trace"
    if gain.low_frac is not None and gain.high_frac is not None:
        said += f", and the interval ({signed_percent(gain.low_frac)} to {signed_percent(gain.high_frac)}) has to lie "
        said += "above 0 for the tuned configuration to count as better"
    return Drawing((draw("gain", *_SIZE, paint, **shape),), f"The gain as the engine measured it: {said}.")


def _paint_pairs(axis: Axes, gain: Gain) -> None:
    for pair in zip(gain.default_per_s, gain.tuned_per_s, strict=True):
        axis.plot([0, 1], pair, "o-", color=ENGINE, linewidth=1, markersize=5, alpha=0.75)
    axis.set_xticks([0, 1], ["default", "tuned"])
    axis.set_xlim(-0.35, 1.35)
    axis.set_ylim(0, 1.1 * max(*gain.default_per_s, *gain.tuned_per_s, 1e-9))
    axis.set_ylabel("goodput, tokens per s")


def _paint_interval(axis: Axes, gain: Gain) -> None:
    assert gain.gain_frac is not None
    assert gain.low_frac is not None
    assert gain.high_frac is not None
    middle, low, high = (100 * f for f in (gain.gain_frac, gain.low_frac, gain.high_frac))
    mean = sum(gain.default_per_s) / len(gain.default_per_s)
    each = [100 * (b - a) / mean for a, b in zip(gain.default_per_s, gain.tuned_per_s, strict=True)]
    axis.plot([-0.25] * len(each), each, "o", color=ENGINE, markersize=4, alpha=0.5)
    axis.errorbar([0.2], [middle], [[middle - low], [high - middle]], fmt="o", color=ENGINE, capsize=5, markersize=7)
    axis.axhline(0, color=ALARM, linewidth=1)
    axis.set_xlim(-0.6, 0.6)
    axis.set_xticks([-0.25, 0.2], ["pairs", "95 % CI"])
    axis.set_ylabel("gain, % of the default")


def _history(trials: list[Trial]) -> tuple[list[int], list[float]]:
    return [t.number for t in trials], [t.goodput_per_s for t in trials]

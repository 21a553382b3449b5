"""What each decision of the profiled model is worth on measured machines: the validation again, one decision undone.

    python benchmarks/validation_measured.py DIR...      folders as of `xllm-lab validate measured`

Printed per folder and variant: mean and worst |error| of the 15 rows, and the means of TTFT, TPOT and latency.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from xllm_lab.policies.api import BatchPlan, BatchView
from xllm_lab.policies.batch.vllm import Vllm
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.scheduler import Scheduler
from xllm_lab.sim.cost.interpolation import Surface
from xllm_lab.sim.cost.profile_bundle import ProfileBundle, read_bundle
from xllm_lab.sim.cost.profiled import ProfiledCost
from xllm_lab.sim.cost.profiled_attention import Attention
from xllm_lab.sim.validate import measured

Change = Callable[[], Any]


def bundles(change: Callable[[ProfileBundle], ProfileBundle]) -> Change:
    return lambda: patch.object(measured, "read_bundle", lambda *a: change(read_bundle(*a)))


def skew_times(factor: float) -> Callable[[ProfileBundle], ProfileBundle]:
    return lambda b: replace(b, skew=tuple(replace(s, excess_frac=s.excess_frac * factor) for s in b.skew))


def one_chunk() -> Any:
    """All prefill of a batch as one chunk of its tokens, after the sum of what was before each: the peer's way."""
    whole = Attention.mixed

    def mixed(self: Attention, chunks: Any, *rest: Any) -> tuple[float, bool]:
        tokens, before = (sum(column) for column in zip(*chunks, strict=True))
        return whole(self, [type(next(iter(chunks)))(tokens, before)], *rest)

    return patch.object(Attention, "mixed", mixed)


class _NobodyDrains:
    """A policy's view that shows no requests whose last token is under way."""

    draining = ()

    def __init__(self, view: BatchView) -> None:
        self._view = view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)


class PlacesAtOnce(Vllm):
    """vLLM's policy, if a place were free as soon as the last token is scheduled."""

    def decide(self, view: BatchView) -> BatchPlan:
        return Vllm.decide(self, _NobodyDrains(view))


def lose_tokens(scheduler: Scheduler, *_: Any) -> list[Any]:
    scheduler._due.clear()
    return []


VARIANTS: dict[str, Change] = {
    "as it is": lambda: patch.object(Surface, "__doc__", Surface.__doc__),
    "unequal lengths add nothing": bundles(lambda b: replace(b, skew=())),
    "unequal lengths add a third": bundles(skew_times(1 / 3)),
    "no padding to graphs": lambda: patch.object(measured, "shapes_policy", lambda folder: EAGER),
    "several chunks as one": one_chunk,
    "no whole tiles": lambda: patch.object(ProfiledCost, "_whole_tiles", lambda self, tokens: tokens),
    "no planning ahead": lambda: patch.object(
        measured, "instance_config", lambda *a, of=measured.instance_config: replace(of(*a), async_scheduling="off")
    ),
    "a place is free once all is scheduled": lambda: patch.object(measured, "Vllm", PlacesAtOnce),
    "a token under way is lost with its KV": lambda: patch.object(Scheduler, "_complete_due", lose_tokens),
    "prompts are shared once computed": lambda: patch.object(Scheduler, "_publish_ahead", lambda *_: None),
    "first chunk must fit, not the prompt": lambda: patch.object(
        measured, "Vllm", lambda: Vllm(reserve_whole_prompt=False)
    ),
    "no two prompts begin alike": lambda: patch.object(measured, "_shared", lambda *a: ()),
    "no prefix cache": lambda: patch.object(
        measured, "instance_config", lambda *a, of=measured.instance_config: replace(of(*a), enable_prefix_cache=False)
    ),
}


def main(folders: list[str]) -> None:
    for name, change in VARIANTS.items():
        total = []
        for folder in folders:
            with change():
                found = measured.validate_measured(Path(folder))
            errors = [row.error_frac for row in found.rows]
            total += [abs(e) for e in errors]
            means = " ".join(f"{row.metric} {row.error_frac:+.2%}" for row in found.rows if row.statistic == "mean")
            worst = max(errors, key=abs)
            print(
                f"{name:<38}{Path(folder).name:<28}{found.mean_abs_error_frac:>7.2%}{worst:>+8.2%}   {means}",
                flush=True,
            )
        print(f"{name:<38}{'all':<28}{sum(total) / len(total):>7.2%}{max(total):>8.2%}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What the page may claim, kept apart: *verified*, it does what was written; *validated*, it matches a machine."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from xllm_lab.runs import Run
from xllm_lab.sim.compare import ACCEPTED_ERROR_FRAC, ACCEPTED_SPREADS, Row
from xllm_lab.wording import percent, signed_percent


def verified(engine: Run) -> str:
    """Parity, shown here and now: the simulator decides the engine's run again.

    Raises:
        ConfigError: the run is not an engine's.
    """
    from xllm_lab.sim.parity import parity  # needs simpy, which a page about engine runs alone does not

    outcome = parity(engine)
    if outcome.is_identical:
        found = (
            f"Parity holds: with the arrivals, step times and tokens of {engine.path.name}, the simulator's scheduler "
            f"takes all {outcome.num_steps:,} decisions as the engine's did."
        )
    else:
        found = (
            f"Parity is broken: with the arrivals, step times and tokens of {engine.path.name}, the simulator decides "
            f"otherwise from step {outcome.step} of {outcome.num_steps:,} on. Do not trust the numbers below."
        )
    laws = "The laws of a run (conservation, capacity, causality, repeatability) are kept by the project's tests."
    return _claim("Verified", "it does what was written", [found, laws], is_kept=outcome.is_identical)


def validated(simulated: Run, engine: Sequence[Run], rows: Sequence[Row]) -> str:
    """Error against measurements, beside the engine's own spread, and what the step times were fitted on."""
    num_within = sum(row.is_within for row in rows)
    told = [
        f"{num_within} of {len(rows)} metrics are within {percent(ACCEPTED_ERROR_FRAC)} of the engine, or within "
        f"{ACCEPTED_SPREADS:g} times its own run-to-run spread over {_runs(len(engine))}.",
        *_timing_facts(simulated.manifest.timing),
    ]
    is_kept = num_within == len(rows) and not _extrapolates(simulated)
    return _claim("Validated", "it matches a machine", told, is_kept=is_kept)


def warnings(simulated: Run, engine: Sequence[Run]) -> list[str]:
    """Boxes for what a reader must know before believing the error column."""
    timing = simulated.manifest.timing
    found = []
    if _extrapolates(simulated):
        found.append(
            f"{percent(timing['extrapolated_frac'])} of the simulated steps lie outside the calibrated range; their "
            "times are guesses. Calibrate on runs that cover this load."
        )
    # A run's name is all that a calibration keeps of it.
    seen = [run.path.name for run in engine if run.path.name in timing.get("calibrated_on", ())]
    if seen:
        found.append(
            f"The step times were fitted on a run of the same name as {', '.join(seen)}: if it is that run, the errors "
            "below are not held out, and flatter the simulator."
        )
    return [warning(text) for text in found]


def warning(text: str) -> str:
    return f'<p class="warning"><strong>Warning.</strong> {escape(text)}</p>'


def residual_text(residual: dict[str, Any]) -> str:
    """The fields of `calibrate.Residual` in a sentence."""
    return (
        f"Step times are off by {percent(residual['mape_frac'])} on average ({percent(residual['p90_frac'])} at P90, "
        f"{signed_percent(residual['bias_frac'])} in sum) on steps that the fit did not see; "
        f"{residual['num_steps']:,} steps."
    )


def _extrapolates(simulated: Run) -> bool:
    from xllm_lab.sim.simulator import EXTRAPOLATED_FRAC_WARNING  # needs simpy

    extrapolated_frac: float = simulated.manifest.timing.get("extrapolated_frac", 0.0)
    return extrapolated_frac > EXTRAPOLATED_FRAC_WARNING


def _timing_facts(timing: dict[str, Any]) -> list[str]:
    facts = []
    if "residual" in timing:
        facts.append(residual_text(timing["residual"]))
    if "extrapolated_frac" in timing:
        facts.append(f"{percent(timing['extrapolated_frac'])} of the simulated steps lie outside the calibrated range.")
    return facts


def _claim(name: str, meaning: str, facts: Sequence[str], *, is_kept: bool) -> str:
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    kind = "kept" if is_kept else "broken"
    return f'<section class="claim {kind}"><h3>{name} <small>{meaning}</small></h3><ul>{items}</ul></section>'


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"

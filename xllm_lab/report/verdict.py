"""The page's first line: what was found, in numbers, and no more than was shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from xllm_lab.metrics import Summary, summarize
from xllm_lab.runs import Run
from xllm_lab.wording import compact, signed_percent

if TYPE_CHECKING:  # they need optuna and torch, which a page without them does not
    from xllm_lab.tuning.study import Study
    from xllm_lab.tuning.verify import Verification


class Verdict(NamedTuple):
    """A sentence, and how it is meant: "better", "same" or "plain"."""

    text: str
    kind: str


def verdict(
    engine: Sequence[Run], simulated: Run | None, study: Study | None, verification: Verification | None
) -> Verdict:
    """The strongest thing that can be said: of a verification before a study, of a study before single runs."""
    if verification is not None:
        return _verified(verification)
    if study is not None:
        return _searched(study)
    if engine:
        return Verdict(_served("The engine served", [summarize(run.records) for run in engine]), "plain")
    assert simulated is not None
    return Verdict(_served("In simulation, the engine would have served", [summarize(simulated.records)]), "plain")


def _verified(verification: Verification) -> Verdict:
    gain = verification.gain
    default = sum(gain.default_per_s) / len(gain.default_per_s)
    tuned = sum(gain.tuned_per_s) / len(gain.tuned_per_s)
    rates = f"tuned serves {compact(tuned)} tok/s within SLO, default {compact(default)}"
    pairs = f"{len(gain.default_per_s)} paired replays on the engine"
    if verification.default == verification.tuned:
        text = f"Nothing better than the default was found; it serves {compact(default)} tok/s within SLO."
        return Verdict(text, "same")
    if gain.gain_frac is None or gain.low_frac is None or gain.high_frac is None:
        return Verdict(f"No gain can be stated: {rates}, in {pairs}.", "same")
    interval = (
        f"{signed_percent(gain.gain_frac)} (95 % CI {signed_percent(gain.low_frac)} to "
        f"{signed_percent(gain.high_frac)}, {pairs})"
    )
    if gain.is_better:
        return Verdict(f"{rates[0].upper()}{rates[1:]}: {interval}.", "better")
    return Verdict(f"Nothing better was found, keep the default: {rates}: {interval}.", "same")


def _searched(study: Study) -> Verdict:
    best, default = study.best, study.default
    tried = f"{len(study.trials)} simulated trials"
    if best.number == default.number:
        return Verdict(
            f"Nothing better than the default was found in {tried}; it serves {compact(default.goodput_per_s)} tok/s "
            "within SLO.",
            "same",
        )
    gain = ""
    if default.goodput_per_s > 0:
        gain = f" ({signed_percent(best.goodput_per_s / default.goodput_per_s - 1)})"
    return Verdict(
        f"The best of {tried} serves {compact(best.goodput_per_s)} tok/s within SLO, the default "
        f"{compact(default.goodput_per_s)}{gain}; not yet verified on the engine.",
        "plain",
    )


def _served(subject: str, summaries: Sequence[Summary]) -> str:
    count = len(summaries)
    goodput = sum(s.goodput_per_s for s in summaries) / count
    output = sum(s.output_throughput_per_s for s in summaries) / count
    served, asked = sum(s.num_served for s in summaries), sum(s.num_requests for s in summaries)
    text = f"{subject} {served:,} of {asked:,} requests: {compact(output)} tok/s, {compact(goodput)} within SLO"
    tails = [s.ttft_us.p90 / 1e6 for s in summaries if s.ttft_us is not None]
    if tails:
        text += f"; P90 TTFT {compact(sum(tails) / len(tails))} s"
    return text + (f" (mean of {count} runs)." if count > 1 else ".")

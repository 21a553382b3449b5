"""Results as plain text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xllm_lab.metrics import Summary

if TYPE_CHECKING:
    from xllm_lab.sim.compare import Row
    from xllm_lab.tuning.verify import Gain


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned first column, the others right-aligned."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def summary_table(summary: Summary) -> str:
    """One run for a terminal: latencies in milliseconds, then the rest."""
    rows = []
    for name in ("ttft_us", "tpot_us", "itl_us", "e2e_us", "queue_us"):
        d = getattr(summary, name)
        if d is not None:
            values = (d.mean, d.p50, d.p90, d.p99)
            rows.append([name.removesuffix("_us").upper(), *(f"{v / 1000:,.1f}" for v in values)])
    rest = {k: v for k, v in summary.as_dict().items() if not isinstance(v, dict) and v is not None}
    lines = [f"{k:<26}{v:,.6g}" for k, v in rest.items()]
    return table(["ms", "mean", "p50", "p90", "p99"], rows) + "\n" + "\n".join(lines)


def comparison_table(rows: Sequence[Row]) -> str:
    """The rows of `compare` for a terminal."""
    cells = [
        [
            row.metric,
            f"{row.engine:,.6g}",
            "-" if row.spread_frac is None else f"{row.spread_frac:.1%}",
            f"{row.simulated:,.6g}",
            "-" if row.error_frac is None else f"{row.error_frac:+.1%}",
            "yes" if row.is_within else "NO",
        ]
        for row in rows
    ]
    return table(["metric", "engine", "spread", "simulator", "error", "within"], cells)


def gain_line(gain: Gain) -> str:
    """One line about a verified gain."""
    default, tuned = (sum(v) / len(v) for v in (gain.default_per_s, gain.tuned_per_s))
    told = f"default {default:.2f}, tuned {tuned:.2f} tokens/s within SLO on the engine"
    if gain.gain_frac is None:
        return f"{told}; no gain can be given"
    interval = f"{gain.gain_frac:+.1%}, 95 % confidence {gain.low_frac:+.1%} to {gain.high_frac:+.1%}"
    return f"{told}: {interval}; {'better' if gain.is_better else 'not shown to be better'}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(line, widths, strict=True)
    return "  ".join((first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest))).rstrip()

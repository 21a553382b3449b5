"""Numbers as a reader wants them: three digits, a unit, a sign that shows."""

from __future__ import annotations

_LATENCIES = {"ttft_us": "TTFT", "tpot_us": "TPOT", "itl_us": "ITL", "e2e_us": "E2E", "queue_us": "Queue"}
_OTHERS = {
    "num_requests": "Requests",
    "num_served": "Served",
    "num_cancelled": "Cancelled",
    "num_rejected": "Rejected",
    "num_failed": "Failed",
    "makespan_s": "Makespan, s",
    "busy_frac": "Busy, %",
    "request_throughput_per_s": "Served, req/s",
    "output_throughput_per_s": "Output, tok/s",
    "goodput_per_s": "Goodput, tok/s",
    "slo_attainment_frac": "SLO attained, %",
    "prefix_hit_frac": "Prefix hits, %",
    "num_preemptions": "Preemptions",
    "num_steps": "Steps",
    "acceptance_length": "Tokens a verification",
    "num_drafted_tokens": "Drafted tokens",
    "num_wasted_tokens": "Drafted in vain",
    "unused_page_frac": "Mapped in vain, %",
    "unfilled_page_frac": "Pages unfilled, %",
    "page_reuse_frac": "Pages found mapped, %",
    "map_frac": "Waited for pages, %",
    "num_offloaded_tokens": "Offloaded tokens",
    "num_restored_tokens": "Restored tokens",
    "num_saved_tokens": "Tokens saved in the store",
    "num_prefetched_tokens": "Tokens prefetched",
    "num_pushed_tokens": "Tokens pushed",
    "num_handed_over": "Handed over",
}


def compact(value: float) -> str:
    """Three significant digits, never an exponent above 1: 0.0123, 4.56, 78.9, 1,234."""
    size = abs(value)
    if size >= 99.95 or value == 0:
        return f"{value:,.0f}".replace("-", "−")
    digits = 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:.{digits}f}".replace("-", "−")


def percent(frac: float) -> str:
    """0.123 -> "12 %", 0.0123 -> "1.2 %", 0.05 -> "5 %"."""
    digits = f"{100 * frac:.{0 if abs(frac) >= 0.0995 else 1}f}".removesuffix(".0")
    return f"{digits} %".replace("-", "−")


def signed_percent(frac: float) -> str:
    """0.123 -> "+12 %"."""
    text = percent(frac)
    return text if text in ("0 %", "−0 %") or frac < 0 else f"+{text}"


def metric_label(metric: str) -> str:
    """`ttft_us.p50` -> "TTFT P50, ms". A metric without a label keeps its name."""
    name, _, level = metric.partition(".")
    return f"{_LATENCIES[name]} {level.upper()}, ms" if name in _LATENCIES else _OTHERS.get(name, metric)


def metric_text(metric: str, value: float) -> str:
    """The value in the unit of `metric_label`."""
    if metric.partition(".")[0] in _LATENCIES:
        return compact(value / 1e3)
    if metric.endswith("_frac"):
        return compact(100 * value)
    return f"{value:,.0f}" if metric.startswith("num_") and value == int(value) else compact(value)

"""xLLM's table of multi-token prediction: costs fitted at three concurrencies, the other rows predicted."""

from __future__ import annotations

from xllm_lab.sim.validate.mtp_server import ACCEPTANCE_FRAC, Measured, Server, fitted_server, serve, table
from xllm_lab.sim.validate.published import Point, PublishedValidation

_TABLES = {
    "tpot_ms": "mean TPOT of DeepSeek with and without MTP, ms",
    "per_s": "output tokens per second",
    "ttft_ms": "mean TTFT, ms",
}
_ASSUMED = (
    "all 80 requests in a closed loop from the start; prompts of 2500 tokens, alone in their steps and not in chunks; "
    "outputs of 1455 in the mean (what the totals leave), Weibull distributed with a shape that is fitted, for N"
    " clients alike would yield N / TPOT tokens/s; figures are means over two orders of them; steps whose time "
    f"is linear in sequences, whatever their context; one draft token, kept at {ACCEPTANCE_FRAC:.0%} (not published: "
    "CloudMatrix384's, arXiv 2506.12708; another would be made up for by the cost of drafts)"
)


def validate_mtp(server: Server | None = None) -> PublishedValidation:
    """Every row beside ours. Deterministic; takes about a minute."""
    server = server or fitted_server()
    ran = {
        (row["clients"], key): serve(server, row["clients"], drafts=key == "mtp")
        for row in table()["rows"]
        for key in ("base", "mtp")
    }
    points = (
        _point(row, key, column, ran[row["clients"], key])
        for column in _TABLES
        for key in ("base", "mtp")
        for row in table()["rows"]
    )
    told = ", ".join(f"{name} {value:.4g}" for name, value in table()["fitted"].items())
    footnote = f"[in brackets] residuals of rows to which constants were fitted: {told}; all others are predictions"
    return PublishedValidation(tuple(points), footnote)


def _point(row: dict[str, dict[str, float]], key: str, column: str, ours: Measured) -> Point:
    return Point(
        table=_TABLES[column],
        what=f"{'MTP' if key == 'mtp' else 'base'}, {row['clients']} clients",
        published=row[key][column],
        predicted=getattr(ours, column),
        source=table()["source"],
        is_fitted=bool(row.get("is_fitted")),
        assumed=_ASSUMED,
    )

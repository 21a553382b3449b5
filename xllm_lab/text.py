"""Results as plain text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xllm_lab.metrics import Summary
from xllm_lab.wording import compact, metric_label, metric_text, percent, signed_percent

if TYPE_CHECKING:
    from xllm_lab.sim.compare import Row
    from xllm_lab.sim.validate.measured import MeasuredValidation
    from xllm_lab.sim.validate.published import PublishedValidation
    from xllm_lab.tuning.drift import Drift
    from xllm_lab.tuning.gain import Gain
    from xllm_lab.tuning.intervals import Interval, KnobEffect, Recommendation
    from xllm_lab.tuning.lint.rules import Rule
    from xllm_lab.tuning.promote import Promotion, Refusal


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned first column, the others right-aligned."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return "\n".join(_aligned(line, widths) for line in lines)


def summary_table(summary: Summary) -> str:
    """One run for a terminal: latencies in milliseconds, then the rest."""
    rows = []
    for name in ("ttft_us", "tpot_us", "itl_us", "e2e_us", "queue_us"):
        d = getattr(summary, name)
        if d is not None:
            values = (d.mean, d.p50, d.p90, d.p99)
            rows.append([name.removesuffix("_us").upper(), *(f"{v / 1000:,.1f}" for v in values)])
    rest = [
        [metric_label(name), metric_text(name, value)]
        for name, value in summary.as_dict().items()
        if not isinstance(value, dict) and value is not None
    ]
    return table(["ms", "mean", "P50", "P90", "P99"], rows) + "\n\n" + table(["", ""], rest).lstrip()


def comparison_table(rows: Sequence[Row]) -> str:
    """The rows of `compare` for a terminal."""
    cells = [
        [
            metric_label(row.metric),
            metric_text(row.metric, row.engine),
            "-" if row.spread_frac is None else percent(row.spread_frac),
            metric_text(row.metric, row.simulated),
            "-" if row.error_frac is None else signed_percent(row.error_frac),
            "yes" if row.is_within else "NO",
        ]
        for row in rows
    ]
    return table(["", "engine", "spread", "simulator", "error", "within?"], cells)


def gain_line(gain: Gain) -> str:
    """One line about a verified gain."""
    default, tuned = (sum(v) / len(v) for v in (gain.default_per_s, gain.tuned_per_s))
    told = f"goodput on the engine: default {compact(default)}, tuned {compact(tuned)} tok/s"
    if gain.gain_frac is None or gain.low_frac is None or gain.high_frac is None:
        return f"{told}; no gain can be given"
    low, high = signed_percent(gain.low_frac), signed_percent(gain.high_frac)
    verdict = "better" if gain.is_better else "not shown to be better"
    return f"{told}: {signed_percent(gain.gain_frac)}, 95 % confidence {low} to {high}; {verdict}"


def left_out_line(target: str, left_out: Mapping[str, Any]) -> str:
    """What an export could not say."""
    return f"{target} has no flag for {', '.join(f'{name}={value}' for name, value in left_out.items())}"


def measured_validation_table(found: Sequence[MeasuredValidation]) -> str:
    """For each folder measured and simulated milliseconds beside another simulator's error, and means of errors."""
    blocks = [_measured_folder(v) for v in found]
    if len(found) > 1:
        blocks.append(f"all {len(found)} folders: {_measured_verdict(found)}")
    return "\n\n".join(blocks)


def _measured_folder(v: MeasuredValidation) -> str:
    rows = [
        [
            f"{row.metric} {row.statistic}",
            f"{row.measured_ms:.1f}",
            f"{row.ours_ms:.1f}",
            f"{row.error_frac:+.2%}",
            "-" if row.reference_error_frac is None else f"{row.reference_error_frac:+.2%}",
        ]
        for row in v.rows
    ]
    told = (
        f"{v.num_shared_prompts} prompts are known to begin as an earlier one; {v.num_preemptions} preemptions; "
        f"{v.extrapolated_frac:.1%} of the steps are outside the profile's tables"
    )
    if v.links_of is not None:
        told += f"; links between devices are not told, and taken as {v.links_of}'s"
    head = [f"{v.folder.name}, ms", "measured", "ours", "error", "LLMServingSim"]
    return "\n".join((table(head, rows), _measured_verdict([v]), told))


def _measured_verdict(found: Sequence[MeasuredValidation]) -> str:
    rows = [row for v in found for row in v.rows]
    worst = max(rows, key=lambda row: abs(row.error_frac))
    ours = sum(abs(row.error_frac) for row in rows) / len(rows)
    others = [abs(row.reference_error_frac) for row in rows if row.reference_error_frac is not None]
    other = f"; LLMServingSim {sum(others) / len(others):.2%}, {max(others):.2%}" if others else ""
    return f"mean |error| {ours:.2%}, worst {worst.metric} {worst.statistic} {worst.error_frac:+.2%}{other}"


def published_table(found: PublishedValidation) -> str:
    """Published figures beside predicted ones, table by table, with their errors and means of them."""
    blocks = []
    for name, points in found.tables.items():
        rows = [
            [
                f"{point.what} ({point.note})" if point.note else point.what,
                compact(point.published),
                "-" if point.predicted is None else compact(point.predicted),
                "-" if point.error_frac is None else _error_text(point.error_frac, point.is_fitted),
            ]
            for point in points
        ]
        residual, error = (found.mean_error_frac(name, is_fitted=fitted) for fitted in (True, False))
        means = [f"mean of |error| {percent(error)}"] if error is not None else []
        means += [f"mean of |residual| {percent(residual)}"] if residual is not None else []
        told = dict.fromkeys((*(p.assumed and f"assumed: {p.assumed}" for p in points), *(p.source for p in points)))
        lines = (table([name, "published", "predicted", "error"], rows), ", ".join(means), *filter(None, told))
        blocks.append("\n  ".join(lines))
    return "\n\n".join((*blocks, found.footnote))


def _error_text(error_frac: float, is_fitted: bool) -> str:
    text = signed_percent(error_frac)
    return f"[{text}]" if is_fitted else text


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(line, widths, strict=True)
    return "  ".join((first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest))).rstrip()


def policies_page(catalogue: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Every policy and knob (`verbs.catalogue`) in Markdown, for `docs/policies.md`."""
    lines = ["# Policies", "", "Written by `xllm-lab policies --markdown`; a test keeps this page so."]
    for decides, entries in catalogue.items():
        lines += ["", f"## {decides}", "", "| policy | knob | what it does; default and range |", "|---|---|---|"]
        for name, entry in entries.items():
            rows = [
                (f"`{name}`", "", entry["what"]),
                *(("", f"`{knob}`", told) for knob, told in entry["knobs"].items()),
            ]
            lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def rules_page(rules: Sequence[Rule]) -> str:
    """Every rule of `lint` in Markdown, for `docs/lint.md`."""
    lines = ["# Rules of `xllm-lab lint`", "", "Written by `xllm-lab lint --rules`; a test keeps this page so.", ""]
    lines += [
        "Each example breaks its rule and no other, up to notes. `fix` marks rules whose example `--fix` repairs."
    ]
    for kind in dict.fromkeys(rule.kind for rule in rules):
        lines += [
            "",
            f"## {kind}",
            "",
            "| rule | | what it finds | xLLM | for example | rests on |",
            "|---|---|---|---|---|---|",
        ]
        for rule in rules:
            if rule.kind == kind:
                cells = (
                    f"`{rule.id}`",
                    f"{rule.severity}, fix" if rule.is_repaired else str(rule.severity),
                    rule.what,
                    _versions_cell(rule),
                    _example_cell(rule),
                    rule.source,
                )
                lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _versions_cell(rule: Rule) -> str:
    first, last = rule.versions[0], rule.versions[-1]
    if str(rule.kind) != "xLLM" or len(rule.versions) > len(rule.every_version) - 1:
        return ""
    return first if first == last else f"{first} on" if last == rule.every_version[-1] else f"{first} to {last}"


def _example_cell(rule: Rule) -> str:
    told = "<br>".join(f"`{line}`" for line in rule.example.splitlines())
    beside = {k: v for k, v in rule.example_situation.items() if k != "version"}
    return told + (f" with {', '.join(f'{k} {v}' for k, v in beside.items())}" if beside else "")


def recommendation_table(found: Recommendation) -> str:
    """Predicted intervals of the default and the candidate, where numbers come from, and what each change is worth."""
    rows = []
    for metric, tuned in found.tuned.items():
        was = found.default.get(metric)
        cells = [interval_text(metric, was) if was else "-", interval_text(metric, tuned), str(tuned.provenance)]
        rows.append([metric_label(metric), *cells])
    blocks = [table(["95 % together", "default", "recommended", "step times"], rows)]
    if found.knobs:
        changes = [[k.knob, f"{k.default} -> {k.tuned}", _effect_text(k)] for k in found.knobs]
        blocks.append(table(["change", "", "goodput it is worth"], changes))
    error = "measured" if found.is_error_measured else "as much as `compare` accepts; tell engine runs with --known"
    blocks.append(f"over {found.num_workloads} arrivals; the simulator's own error: {error}")
    return "\n\n".join(blocks)


def interval_text(metric: str, interval: Interval) -> str:
    """`12 (10 to 14)`, in the metric's unit."""
    expected, low, high = (metric_text(metric, v) for v in (interval.expected, interval.low, interval.high))
    return f"{expected} ({low} to {high})"


def _effect_text(effect: KnobEffect) -> str:
    if effect.effect_frac is None or effect.low_frac is None or effect.high_frac is None:
        return "needed: nothing is served in time without"
    effect_text, low, high = map(signed_percent, (effect.effect_frac, effect.low_frac, effect.high_frac))
    told = f"{effect_text} ({low} to {high})"
    return f"{told}, in the noise" if effect.is_in_noise else told


def promotion_text(done: Promotion | None, why: Sequence[Refusal]) -> str:
    """What was promoted, or each reason against it."""
    if done is None:
        return "\n".join(("not promoted", *(f"  {refusal.reason}: {refusal.says}" for refusal in why)))
    return (
        f"promoted: {done.config}\n  evidence and the way back are beside it, and analysis-template.yaml for a canary"
    )


def drift_text(found: Drift) -> str:
    """Each feature then and now, the verdict, and what it costs."""
    rows = [
        [c.feature, compact(c.was), compact(c.now), compact(c.threshold), "DRIFT" if c.is_drift else "-"]
        for c in found.changes
    ]
    lines = [table(["", "tuned for", "now", "noise", ""], rows), ""]
    lines.append("left the tuned region" if found.has_drifted else "within the tuned region")
    cost = found.cost
    if cost is None or cost.gain_frac is None or cost.low_frac is None or cost.high_frac is None:
        none = cost is None
        lines.append(
            f"in the simulator, the promoted configuration has the most goodput of {found.num_candidates + 1}"
            if none
            else "in the simulator, the promoted configuration keeps no promise here, and another does"
        )
    else:
        low, high = signed_percent(cost.low_frac), signed_percent(cost.high_frac)
        lines.append(f"in the simulator, another has {signed_percent(cost.gain_frac)} goodput ({low} to {high})")
    return "\n".join(lines + ["it pays to tune again"] * found.pays_to_tune)

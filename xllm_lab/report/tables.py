"""The page's tables. Every function takes plain values and returns HTML in which all text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from xllm_lab.fleet_config import FLEET_DECISIONS
from xllm_lab.metrics import metric_value, summarize
from xllm_lab.runs import Manifest, Run
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.compare import METRICS, Row
from xllm_lab.step_time import TERMS
from xllm_lab.wording import compact, metric_label, metric_text, percent, signed_percent

_ABSENT = "–"


def configurations(default: Mapping[str, Any], tuned: Mapping[str, Any]) -> str:
    """Every field of two candidates (`Candidate.as_dict`), those that differ marked."""
    rows = []
    before, after = _labelled(default), _labelled(tuned)
    for label in dict.fromkeys((*before, *after)):
        sides = (before.get(label, _ABSENT), after.get(label, _ABSENT))
        rows.append(_row((label, *map(_plain, sides)), "changed" if sides[0] != sides[1] else ""))
    return _table(("", "default", "tuned"), rows, "configurations")


def _labelled(side: Mapping[str, Any]) -> dict[str, Any]:
    """A candidate's fields under the names that they have in the table."""
    labelled = dict(side["instance"])
    for decides, values in side["policies"].items():
        what, prefix = ("policy", "") if decides == "batch" else (decides, f"{decides}.")
        labelled |= {what if name == "name" else prefix + name: value for name, value in values.items()}
    for name, value in side.get("fleet", {}).items():
        if name in FLEET_DECISIONS:
            labelled |= {name if knob == "policy" else f"{name}.{knob}": of for knob, of in value.items()}
        else:
            labelled[f"fleet.{name}"] = value
    return labelled


def comparison(rows: Sequence[Row]) -> str:
    """Engine against simulator, metric by metric."""
    body = [
        _row(
            (
                metric_label(row.metric),
                metric_text(row.metric, row.engine),
                _ABSENT if row.spread_frac is None else percent(row.spread_frac),
                metric_text(row.metric, row.simulated),
                _ABSENT if row.error_frac is None else signed_percent(row.error_frac),
                "yes" if row.is_within else "no",
            ),
            "within" if row.is_within else "outside",
        )
        for row in rows
    ]
    return _table(("", "engine", "spread", "simulator", "error", "within?"), body, "comparison numbers")


def measurements(runs: Sequence[Run]) -> str:
    """Each metric of one host's runs alone: mean, smallest, largest."""
    summaries = [summarize(run.records) for run in runs]
    body = []
    for metric in METRICS:
        values = [value for s in summaries if (value := metric_value(s, metric)) is not None]
        if values:
            shown = (sum(values) / len(values), min(values), max(values))
            body.append(_row((metric_label(metric), *(metric_text(metric, v) for v in shown))))
    return _table(("", "mean", "smallest", "largest"), body, "numbers")


def calibration_terms(calibration: Calibration) -> str:
    """Weight of each term of a step's time, and how far it was calibrated."""
    rows = [
        _row((term.removesuffix("_us"), compact(weight) if weight >= 1 else f"{weight:.3g}", f"{highest:,.0f}"))
        for term, weight, highest in zip(TERMS, calibration.step_time.weights, calibration.highest, strict=True)
    ]
    host = {"host, each step": calibration.host.step_us, "host, each sequence": calibration.host.sequence_us}
    rows += [_row((term, f"{us:.3g}", "")) for term, us in host.items() if us]
    return _table(("term of a step", "µs per unit", "largest seen"), rows, "numbers")


def provenance(manifests: Mapping[str, Manifest]) -> str:
    """The facts of several runs side by side; a fact that all share is told once."""
    facts = {name: _facts(manifest) for name, manifest in manifests.items()}
    rows = []
    for label in next(iter(facts.values())):
        values = [each[label] for each in facts.values()]
        if len(set(values)) == 1:
            cells = f'<td colspan="{len(values)}">{escape(values[0])}</td>'
        else:
            cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    return _table(("", *facts), rows, "provenance")


def _facts(manifest: Manifest) -> dict[str, str]:
    """A manifest as labelled text, the same labels in the same order for every host."""
    return {
        "host": manifest.host,
        "commit": manifest.commit,
        "model": _listed(manifest.model) or _ABSENT,
        "workload": str(manifest.workload.get("source", _ABSENT)),
        "checksum": str(manifest.workload.get("checksum") or _ABSENT),
        "seed": str(manifest.workload.get("seed", _ABSENT)),
        "requests": str(manifest.workload.get("num_requests", _ABSENT)),
        "policies": "; ".join(f"{decides} {_policy(values)}" for decides, values in manifest.policies.items()),
        "instance": _listed(manifest.instance),
        "timing": _listed(manifest.timing) or _ABSENT,
        "hardware": _listed(_with_gib(manifest.hardware)) or _ABSENT,
        "versions": _listed(manifest.versions) or _ABSENT,
    }


def _policy(described: Mapping[str, Any]) -> str:
    values = {k: v for k, v in described.items() if k != "name"}
    return str(described.get("name", _ABSENT)) + (f": {_listed(values)}" if values else "")


def _with_gib(hardware: Mapping[str, Any]) -> dict[str, Any]:
    readable = dict(hardware)
    if isinstance(readable.get("memory_bytes"), int):
        readable["memory_gib"] = round(readable.pop("memory_bytes") / 2**30, 1)
    return readable


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_listed(value)})"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[str], kind: str) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in head)
    body = "\n".join(rows)
    return f'<table class="{kind}">\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'


def _row(cells: Sequence[str], kind: str = "") -> str:
    first, *others = map(escape, cells)
    marked = f' class="{kind}"' if kind else ""
    return f'<tr{marked}><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>"

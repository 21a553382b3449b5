"""Assembles the page: a verdict, the evidence for it, and where every number comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from xllm_lab.errors import ConfigError
from xllm_lab.report import claims, tables
from xllm_lab.report.verdict import Verdict, verdict
from xllm_lab.runs import Run, new_file, read_run
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.compare import compare

if TYPE_CHECKING:  # optuna, torch and matplotlib are imported only for the parts that need them
    from xllm_lab.report.drawing import Drawing
    from xllm_lab.tuning.study import Study
    from xllm_lab.tuning.verify import Verification

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>xLLM Lab report</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_report(
    out: Path,
    *,
    engine: Sequence[Run],
    simulated: Run | None = None,
    calibration: Calibration | None = None,
    study: Study | None = None,
    verification: Path | None = None,
) -> Path:
    """Write one self-contained HTML page about whatever is given; the same inputs give the same bytes.

    Args:
        out: the file; one that exists is replaced.
        engine: runs of one workload, policy and configuration. Their spread is the yardstick of the simulator's error.
        simulated: a run of that same workload, policy and configuration.
        verification: the folder that `verify` wrote.

    Raises:
        ConfigError: nothing is given, a run is of the wrong host, or runs to be compared did not do the same thing.
        RunError: a run or the verification cannot be read, or the page cannot be written.
    """
    for run, host in (*((r, "engine") for r in engine), *((r, "simulator") for r in (simulated,) if r is not None)):
        if run.manifest.host != host:
            raise ConfigError(f"{run.path}: is a {run.manifest.host} run; accepted here: a {host} run")
    measured = _read_verification(verification) if verification is not None else None
    if not engine and simulated is None and study is None and measured is None:
        raise ConfigError("nothing to report on; accepted: an engine run, a simulated run, a study or a verification")
    sources = _sources(engine, simulated, verification)
    body = "\n".join(
        (
            *_head(verdict(engine, simulated, study, measured), sources, study),
            *_configurations(study, measured),
            *_numbers(engine, simulated),
            *_calibration(calibration),
            *_figures(engine, simulated, study, measured),
            *_provenance(sources),
        )
    )
    style = resources.files("xllm_lab.report").joinpath("style.css").read_text(encoding="utf-8")
    with new_file(out) as file:
        file.write_text(_PAGE.format(style=style, body=body), encoding="utf-8")
    return out


def _head(found: Verdict, sources: dict[str, Run], study: Study | None) -> Iterator[str]:
    """What was served by what on what, then the verdict."""
    told: list[str] = []
    if sources:
        manifest = next(iter(sources.values())).manifest
        facts = (manifest.model.get("name"), manifest.workload.get("source"), manifest.hardware.get("cpu"))
        told = [str(fact) for fact in facts if fact]
    elif study is not None:
        told = [str(fact) for fact in (study.spec["model"].get("name"), *study.spec["workloads"]) if fact]
    yield f"<header><h1>xLLM Lab report</h1><p>{escape(' · '.join(told))}</p></header>"
    yield f'<p class="verdict {found.kind}">{escape(found.text)}</p>'


def _configurations(study: Study | None, measured: Verification | None) -> Iterator[str]:
    if measured is not None:
        default, tuned = measured.default.as_dict(), measured.tuned.as_dict()
    elif study is not None:
        default, tuned = study.default.candidate.as_dict(), study.best.candidate.as_dict()
    else:
        return
    yield "<section><h2>Default and tuned configuration</h2>"
    if study is not None and measured is not None and study.best.candidate.as_dict() != tuned:
        yield claims.warning("What was verified is not the best candidate of the study on this page.")
    yield tables.configurations(default, tuned) + "</section>"


def _numbers(engine: Sequence[Run], simulated: Run | None) -> Iterator[str]:
    if simulated is None and not engine:
        return
    if simulated is None or not engine:
        who = "What the engine measured" if engine else "What the simulator predicts"
        yield f"<section><h2>{who}</h2>{tables.measurements(engine or [run for run in (simulated,) if run])}</section>"
        return
    rows = compare(simulated, engine)
    yield "<section><h2>Engine and simulator</h2>"
    yield from claims.warnings(simulated, engine)
    yield f'<div class="claims">{claims.verified(engine[0])}{claims.validated(simulated, engine, rows)}</div>'
    yield tables.comparison(rows)
    yield (
        '<p class="note">Spread: (largest − smallest) / mean over the engine runs. Error: (simulator − engine) / '
        "engine.</p></section>"
    )


def _calibration(calibration: Calibration | None) -> Iterator[str]:
    if calibration is None:
        return
    yield "<section><h2>Calibration</h2>"
    where = ", ".join(str(v) for k, v in calibration.hardware.items() if k in ("cpu", "system"))
    yield f"<p>{escape(claims.residual_text(asdict(calibration.residual)))}"
    yield escape(f"Fitted on {', '.join(calibration.runs)}" + (f" on {where}." if where else ".")) + "</p>"
    yield tables.calibration_terms(calibration) + "</section>"


def _figures(
    engine: Sequence[Run], simulated: Run | None, study: Study | None, measured: Verification | None
) -> Iterator[str]:
    drawings = [drawing for drawing in _drawings(engine, simulated, study, measured) if drawing is not None]
    if not drawings:
        return
    yield "<section><h2>Figures</h2>"
    blue, orange = '<b class="engine">Blue</b>', '<b class="simulator">orange</b>'
    yield f'<p class="note">{blue} is measured on the engine, {orange} is simulated.</p>'
    yield '<div class="figures">'
    for number, drawing in enumerate(drawings, start=1):
        panels = "".join(f"<div>{svg}</div>" for svg in drawing.svgs)
        kind = {1: "one", 2: "two"}.get(len(drawing.svgs), "three")
        yield f'<figure class="{kind}"><div class="panels">{panels}</div>'
        yield f"<figcaption><b>Figure {number}.</b> {escape(drawing.caption)}</figcaption></figure>"
    yield "</div></section>"


def _drawings(
    engine: Sequence[Run], simulated: Run | None, study: Study | None, measured: Verification | None
) -> Iterator[Drawing | None]:
    from xllm_lab.report import figures, tuning_figures

    runs = [*engine, *([simulated] if simulated is not None else [])]
    if runs:
        # One run of each host: repeats look alike, and their spread is in the table.
        panels = {run.manifest.host: run for run in reversed(runs)}
        panels = {host: panels[host] for host in sorted(panels)}
        yield figures.latency_cdfs(runs)
        yield figures.batch_composition(panels)
        yield figures.kv_use(panels)
    if study is not None:
        yield tuning_figures.tuning_history(study)
        yield tuning_figures.pareto_front(study)
    if measured is not None:
        yield tuning_figures.verified_gain(measured.gain)


def _provenance(sources: dict[str, Run]) -> Iterator[str]:
    if sources:
        manifests = {name: run.manifest for name, run in sources.items()}
        yield f"<section><h2>Provenance</h2>{tables.provenance(manifests)}</section>"


def _sources(engine: Sequence[Run], simulated: Run | None, verification: Path | None) -> dict[str, Run]:
    """A run of each kind, whose manifest speaks for the others of its kind."""
    sources = {"engine": engine[0]} if engine else {}
    if simulated is not None:
        sources["simulator"] = simulated
    if verification is not None:
        from xllm_lab.tuning.verify import runs_of

        replays = runs_of(verification, "tuned")
        if replays:
            sources["verification, tuned"] = read_run(replays[0])
    return sources


def _read_verification(path: Path) -> Verification:
    from xllm_lab.tuning.verify import read_verification

    return read_verification(path)

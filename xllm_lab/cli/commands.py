"""The verbs: for each, its options and what it does. Parse, call, print; nothing is decided here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xllm_lab import verbs
from xllm_lab.cli import accept, imports, lint, profile
from xllm_lab.cli.machine import acceptance, fleet, fleet_options, machine, machine_options, page_time, tier_options
from xllm_lab.cli.options import (
    configuration,
    configuration_options,
    engine,
    engine_options,
    followed,
    refuse_transforms,
    served_fleet_options,
    trace_options,
    transform_options,
    workload,
)
from xllm_lab.cli.searching import searching, searching_options
from xllm_lab.errors import ConfigError
from xllm_lab.progress import tell
from xllm_lab.runs import Run, new_file, read_run
from xllm_lab.summary_of_run import summarize_run
from xllm_lab.text import (
    comparison_table,
    drift_text,
    gain_line,
    left_out_line,
    measured_validation_table,
    policies_page,
    promotion_text,
    published_table,
    recommendation_table,
    rules_page,
    summary_table,
)

if TYPE_CHECKING:
    from xllm_lab.sim.validate.published import PublishedValidation


class Command(NamedTuple):
    """A verb: what it does in one phrase, what it accepts, and the function that returns its exit status."""

    what: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _replay_options(parser: argparse.ArgumentParser) -> None:
    trace_options(parser)
    configuration_options(parser)
    engine_options(parser)
    fleet_options(parser)
    served_fleet_options(parser)
    parser.add_argument("--calibration", type=Path, help="step times for policies that need them; else measured")
    parser.add_argument("--out", type=Path, required=True, help="new run folder")


def _replay(o: argparse.Namespace) -> int:
    if followed(o):
        return 0
    run = verbs.replay(
        workload(o.trace, o),
        out=o.out,
        **configuration(o),
        engine=engine(o),
        calibration=o.calibration,
        fleet=fleet(o),
        registry=o.registry,
        listen=o.listen,
        progress=not o.quiet,
    )
    return _print_run(run, o)


def _calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="engine runs, or folders of `import`")
    parser.add_argument("--out", type=Path, required=True, help="calibration file")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="of the model of imported profiles")


def _calibrate(o: argparse.Namespace) -> int:
    fitted = verbs.calibrate(o.runs, out=o.out, vocab_size=o.vocab_size)
    r = fitted.residual
    line = (
        f"{o.out}: {r.num_steps} steps; held-out error of a step {r.mape_frac:.1%} (90 % under {r.p90_frac:.1%}), "
        f"of their sum {r.bias_frac:+.1%}"
    )
    return _print(o, asdict(fitted), line)


def _simulate_options(parser: argparse.ArgumentParser) -> None:
    trace_options(parser, nargs="?")
    parser.add_argument("--like", type=Path, help="take workload and configuration from this run")
    configuration_options(parser, of_a_run=True)
    machine_options(parser)
    fleet_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="new run folder")
    parser.add_argument("--no-steps", action="store_true", help="leave steps.parquet empty")
    parser.add_argument("--no-fast-forward", action="store_true", help="step by step; the records are the same")


def _simulate(o: argparse.Namespace) -> int:
    if (o.trace is None) == (o.like is None):
        raise ConfigError("give a trace or --like RUN, one of them")
    if o.like is not None:
        refuse_transforms(o, "--like")
    source = read_run(o.like) if o.like else workload(o.trace, o)
    run = verbs.simulate(
        source,
        machine(o),
        out=o.out,
        **configuration(o),
        fleet=fleet(o),
        acceptance=acceptance(o),
        page_time=page_time(o),
        host_link_bytes_per_s=o.host_link,
        store=o.store,
        expert_trace=o.expert_trace,
        fast_forward=not o.no_fast_forward,
        keep_steps=not o.no_steps,
        progress=not o.quiet,
    )
    _warn_if_extrapolated(run)
    return _print_run(run, o)


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("simulated", type=Path)
    parser.add_argument("engine", nargs="+", type=Path)


def _compare(o: argparse.Namespace) -> int:
    rows = verbs.compare(o.simulated, o.engine)
    value = [{**asdict(row), "is_within": row.is_within} for row in rows]
    return _print(o, value, comparison_table(rows))


def _parity_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path)
    configuration_options(parser, of_a_run=True)


def _parity(o: argparse.Namespace) -> int:
    found = verbs.parity(o.run, **configuration(o))
    if found.is_identical:
        line = f"identical: {found.num_steps} decisions"
        line += f" of instances, {found.num_decisions} {found.of}" * bool(found.num_decisions)
    else:
        where = f"instance {found.instance}: " * (found.instance is not None)
        line = f"{where}step {found.step} differs\n  engine     {found.engine}\n  simulator  {found.simulator}"
        if found.decision is not None:
            what = f"decision {found.decision} {found.of} differs"
            line = f"{what}\n  engine     {found.routed}\n  simulator  {found.routed_again}"
    _print(o, {**asdict(found), "is_identical": found.is_identical}, line)
    return 0 if found.is_identical else 1


def _tune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", nargs="+", type=Path)
    transform_options(parser)
    configuration_options(parser)
    parser.add_argument(
        "--also", nargs="*", default=[], metavar="POLICY", help="further ones to choose from, of any kind"
    )
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--min-slo-attainment", type=float, default=0.0, metavar="FRAC")
    tier_options(parser)
    fleet_options(parser)
    searching_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="study folder; an unfinished one is resumed")


def _tune(o: argparse.Namespace) -> int:
    study = verbs.tune(
        [workload(path, o) for path in o.traces],
        o.calibration,
        out=o.out,
        **configuration(o),
        also=o.also,
        trials=o.trials,
        seed=o.seed,
        min_slo_attainment_frac=o.min_slo_attainment,
        workers=o.workers,
        host_link_bytes_per_s=o.host_link,
        store=o.store,
        expert_trace=o.expert_trace,
        fleet=fleet(o),
        progress=not o.quiet,
        **searching(o),
    )
    value = {
        "study": str(study.path),
        "default": {"candidate": study.default.candidate.as_dict(), "goodput_per_s": study.default.goodput_per_s},
        "best": {
            "trial": study.best.number,
            "candidate": study.best.candidate.as_dict(),
            "goodput_per_s": study.best.goodput_per_s,
        },
    }
    line = (
        f"default {study.default.goodput_per_s:.2f}, best {study.best.goodput_per_s:.2f} tokens/s within SLO, "
        f"{'measured' if o.engine_budget else 'simulated'} (trial {study.best.number} of {len(study.trials)}); "
        "`xllm-lab verify` measures it"
    )
    return _print(o, value, line)


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path)
    trace_options(parser)
    engine_options(parser)
    served_fleet_options(parser)
    parser.add_argument("--repeats", type=int, default=3)
    _known_option(parser)
    parser.add_argument("--out", type=Path, required=True, help="new folder")


def _verify(o: argparse.Namespace) -> int:
    if followed(o):
        return 0
    done = verbs.verify(
        o.study,
        workload(o.trace, o),
        out=o.out,
        repeats=o.repeats,
        engine=engine(o),
        registry=o.registry,
        listen=o.listen,
        known=o.known,
        progress=not o.quiet,
    )
    value = {"gain": {**asdict(done.gain), "is_better": done.gain.is_better}, "winner": done.winner.as_dict()}
    return _print(o, value, gain_line(done.gain))


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verification", type=Path)
    parser.add_argument("--to", required=True, help="target: xllm, xllm_flagfile or vllm")
    parser.add_argument("--engine-version", metavar="V", help="of xLLM: a release or a commit; else the latest known")
    parser.add_argument("--out", type=Path, help="file; else stdout")


def _export(o: argparse.Namespace) -> int:
    made = verbs.export(o.verification, to=o.to, version=o.engine_version)
    text = made.text.rstrip("\n")
    value: dict[str, Any] = made.config
    if o.out is not None:
        with new_file(o.out) as file:
            file.write_text(made.text, encoding="utf-8")
        value, text = {"out": str(o.out), "config": made.config}, str(o.out)
    if made.left_out:
        tell(f"xllm-lab: {left_out_line(o.to, made.left_out)}")
    return _print(o, value, text)


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", nargs="+", type=Path, required=True, metavar="RUN")
    parser.add_argument("--simulated", type=Path, metavar="RUN")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--study", type=Path)
    parser.add_argument("--verification", type=Path)


def _report(o: argparse.Namespace) -> int:
    path = verbs.report(
        o.out,
        engine=o.engine,
        simulated=o.simulated,
        calibration=o.calibration,
        study=o.study,
        verification=o.verification,
    )
    return _print(o, {"report": str(path)}, str(path))


def _timeline_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="file; else RUN.pftrace.gz")


def _timeline(o: argparse.Namespace) -> int:
    path = verbs.timeline(o.run, out=o.out)
    return _print(o, {"timeline": str(path)}, str(path))


def _policies_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="as the page of a manual")


def _policies(o: argparse.Namespace) -> int:
    found = verbs.catalogue()
    if o.markdown:
        return _print(o, found, policies_page(found))
    lines = []
    for decides, entries in found.items():
        lines.append(f"{decides} policies")
        for name, entry in entries.items():
            lines.append(f"  {name}: {entry['what']}")
            lines += [f"      {knob:<24}{note}" for knob, note in entry["knobs"].items()]
    return _print(o, found, "\n".join(lines))


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, help="instead of the demo's own")
    parser.add_argument("--requests", type=int, help="per window; fewer is faster and less certain")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="new folder")


def _demo(o: argparse.Namespace) -> int:
    from xllm_lab.demo import demo

    done = demo(
        trace=o.trace,
        num_requests=o.requests,
        trials=o.trials,
        repeats=o.repeats,
        seed=o.seed,
        out=o.out,
        progress=not o.quiet,
    )
    return _print(o, done.as_dict(), done.as_text())


def _validate_options(parser: argparse.ArgumentParser) -> None:
    against = parser.add_subparsers(required=True, dest="against", metavar="AGAINST")
    for name, (what, options, _) in VALIDATIONS.items():
        sub = against.add_parser(name, help=what, description=what)
        # As before the name; a default here would undo what was said there.
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")
        options(sub)


def _validate(o: argparse.Namespace) -> int:
    return VALIDATIONS[o.against].run(o)


def _validate_npu(o: argparse.Namespace) -> int:
    return _print_published(o, verbs.validate_npu())


def _validate_mtp(o: argparse.Namespace) -> int:
    return _print_published(o, verbs.validate_mtp())


def _print_published(o: argparse.Namespace, found: PublishedValidation) -> int:
    value = [{**asdict(point), "error_frac": point.error_frac} for point in found.points]
    return _print(o, value, published_table(found))


def _profile(o: argparse.Namespace) -> int:
    if o.path is None:
        times = profile.measured(o)
        return _print(o, {"profile": str(o.out), "us": times}, profile.measured_text(times, o.out))
    found = profile.opened(o)
    return _print(o, profile.as_dict(*found), profile.as_text(*found, top=o.top))


def _import(o: argparse.Namespace) -> int:
    done = verbs.import_profile(o.source, o.path, out=o.out, kv_block_tokens=o.kv_block_tokens)
    return _print(o, {"import": str(o.out), **asdict(done)}, imports.as_text(done, o.out))


def _accept(o: argparse.Namespace) -> int:
    if o.dry_run:
        from xllm_lab.acceptance import PLAN, plan_text

        return _print(o, [{"part": part.name, "what": part.what} for part in PLAN], plan_text())
    found = accept.accepted(o)
    _print(o, found.as_dict(), found.as_text())
    return 0 if found.passed else 1


def _lint(o: argparse.Namespace) -> int:
    o.json = o.json or o.format == "json"
    if o.rules:
        rules = verbs.lint_rules()
        return _print(o, [{"id": r.id, "what": r.what, "source": r.source} for r in rules], rules_page(rules))
    lint.refuse_unclear(o)
    found = verbs.lint(o.config, lint.situation(o), fix=o.fix)
    if o.fix and not (o.out or o.in_place or o.json):
        tell(lint.as_text(found))
        print(found.config.text, end="", flush=True)  # noqa: T201
    else:
        if (path := o.config if o.in_place else o.out) is not None:
            with new_file(path) as file:
                file.write_text(found.config.text, encoding="utf-8")
        value = {**lint.as_dict(found), **({"text": found.config.text} if o.fix else {})}
        _print(o, value, lint.as_text(found))
    return 0 if found.is_clean else 1


def _validate_measured_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="holds profile/ and vllm/")
    parser.add_argument("--model-config", type=Path, help="the model's config.json, if it is not a well-known one")
    parser.add_argument("--workload", type=Path, help="what was replayed (JSONL with input_tok_ids), for prefix hits")


def _validate_measured(o: argparse.Namespace) -> int:
    found = [verbs.validate_measured(f, model_config=o.model_config, workload=o.workload) for f in o.folders]
    return _print(o, [v.as_dict() for v in found], measured_validation_table(found))


def _known_option(parser: argparse.ArgumentParser) -> None:
    what = "engine runs that say how wrong the simulator is; else as wrong as `compare` accepts"
    parser.add_argument("--known", nargs="+", type=Path, default=[], metavar="RUN", help=what)


def _recommend_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path)
    _known_option(parser)
    parser.add_argument("--arrivals", type=int, default=5, metavar="N", help="over so many, of the same burstiness")


def _recommend(o: argparse.Namespace) -> int:
    found = verbs.recommend(o.study, known=o.known, arrivals=o.arrivals)
    text = "\n\n".join(f"{source}\n{recommendation_table(one)}" for source, one in found.items())
    return _print(o, {source: one.as_dict() for source, one in found.items()}, text)


def _promote_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verification", type=Path)
    parser.add_argument("--to", required=True, help="target: xllm, xllm_flagfile or vllm")
    parser.add_argument("--engine-version", metavar="V", help="of xLLM: a release or a commit; else the latest known")
    asked = "of requests, for which each promise is kept in the worst repeat; 0.99 unless said"
    parser.add_argument("--min-slo-attainment", type=float, metavar="FRAC", help=asked)
    parser.add_argument("--max-calibration-age-days", type=float, metavar="D", help="30 unless said")
    parser.add_argument("--out", type=Path, required=True, help="folder; an earlier promotion in it is replaced")


def _promote(o: argparse.Namespace) -> int:
    from xllm_lab.tuning.promote import Terms

    said: dict[str, Any] = {}
    if o.min_slo_attainment is not None:
        said["min_kept_frac"] = o.min_slo_attainment
    if o.max_calibration_age_days is not None:
        said["max_calibration_age_s"] = round(o.max_calibration_age_days * 86_400)
    done, why = verbs.promote(o.verification, to=o.to, out=o.out, version=o.engine_version, terms=Terms(**said))
    value = {
        "promoted": None if done is None else str(done.config),
        "refusals": [asdict(refusal) for refusal in why],
    }
    _print(o, value, promotion_text(done, why))
    return 0 if done is not None else 1


def _drift_options(parser: argparse.ArgumentParser) -> None:
    trace_options(parser)
    parser.add_argument("--promoted", type=Path, required=True, metavar="DIR", help="as `promote` wrote it")


def _drift(o: argparse.Namespace) -> int:
    found = verbs.drift(workload(o.trace, o), promoted=o.promoted)
    _print(o, found.as_dict(), drift_text(found))
    return 1 if found.has_drifted else 0


def _print_run(run: Run, o: argparse.Namespace) -> int:
    summary = summarize_run(run)
    return _print(o, {"run": str(run.path), **summary.as_dict()}, f"{summary_table(summary)}\n{run.path}")


def _warn_if_extrapolated(run: Run) -> None:
    from xllm_lab.sim.simulator import EXTRAPOLATED_FRAC_WARNING

    frac = run.manifest.timing["extrapolated_frac"]
    if frac > EXTRAPOLATED_FRAC_WARNING:
        tell(f"xllm-lab: {frac:.0%} of the steps are outside the calibrated range; calibrate on a run like this one")


def _print(o: argparse.Namespace, value: Any, text: str) -> int:
    # Flushed, or a full disk would be found out only after the exit status was chosen.
    print(json.dumps(value, sort_keys=True, default=str) if o.json else text, flush=True)  # noqa: T201
    return 0


VALIDATIONS = {
    "measured": Command(
        "folders of a machine's operator profile and of what vLLM did on it",
        _validate_measured_options,
        _validate_measured,
    ),
    "mtp": Command(
        "xLLM's table of multi-token prediction, three rows of it fitted", lambda parser: None, _validate_mtp
    ),
    "npu": Command("the roofline model beside published Ascend figures", lambda parser: None, _validate_npu),
}
COMMANDS = {
    "replay": Command("serve a trace on the engine", _replay_options, _replay),
    "calibrate": Command("learn step times from engine runs or imported profiles", _calibrate_options, _calibrate),
    "simulate": Command("serve a trace in simulated time", _simulate_options, _simulate),
    "compare": Command("the simulator's error beside the engine's own run-to-run spread", _compare_options, _compare),
    "parity": Command("does the simulator decide as the engine did? exit status 1 if not", _parity_options, _parity),
    "tune": Command("search the knobs of an instance or a fleet in the simulator", _tune_options, _tune),
    "recommend": Command(
        "what a study's best is predicted to do, and which changes matter", _recommend_options, _recommend
    ),
    "verify": Command("measure a study's best against its default on the engine", _verify_options, _verify),
    "export": Command("write a verified configuration as production reads it", _export_options, _export),
    "promote": Command("hand what was verified to production; exit status 1 if refused", _promote_options, _promote),
    "drift": Command("has a trace left the tuned region, at what cost? exit status 1 if so", _drift_options, _drift),
    "report": Command("one HTML page about runs, a study and its verification", _report_options, _report),
    "timeline": Command("what a run did and when, for https://ui.perfetto.dev", _timeline_options, _timeline),
    "policies": Command("every policy and its knobs", _policies_options, _policies),
    "validate": Command("the simulator beside measurements of others", _validate_options, _validate),
    "profile": Command("what a profiler recorded, or this machine's operators, measured", profile.options, _profile),
    "import": Command("keep what a profiler or a server wrote down, for `calibrate`", imports.options, _import),
    "accept": Command("does this machine serve as it must? exit status 1 if not", accept.options, _accept),
    "lint": Command("what is wrong with a configuration of xLLM or vLLM? exit status 1 if so", lint.options, _lint),
    "demo": Command("the whole loop on the embedded model", _demo_options, _demo),
}

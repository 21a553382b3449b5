"""The simulator beside measured machines: `xllm-lab validate WHAT`, one entry of `VALIDATIONS` each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from xllm_lab.sim.validate.measured import Validation


class Check(NamedTuple):
    """What is validated: in one phrase, what it accepts, and the function that returns (JSON value, text)."""

    what: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], tuple[Any, str]]


def validate_options(parser: argparse.ArgumentParser) -> None:
    checks = parser.add_subparsers(required=True, dest="check", metavar="WHAT")
    for name, check in VALIDATIONS.items():
        sub = checks.add_parser(name, help=check.what, description=check.what)
        # Here too, so that they may stand at the end of the line as with every other verb.
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")
        sub.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="no progress bars")
        check.options(sub)


def _measured_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="holds profile/ and vllm/")
    parser.add_argument("--model-config", type=Path, help="the model's config.json, if it is not a well-known one")
    parser.add_argument("--workload", type=Path, help="what was replayed (JSONL with input_tok_ids), for prefix hits")


def _measured(o: argparse.Namespace) -> tuple[Any, str]:
    from xllm_lab.sim.validate.measured import validate_measured

    found = [validate_measured(folder, model_config=o.model_config, workload_file=o.workload) for folder in o.folders]
    return [_as_dict(v) for v in found], "\n\n".join([*map(_table, found), *_joint(found)])


def _as_dict(v: Validation) -> dict[str, Any]:
    return {
        "folder": str(v.folder),
        "rows": [
            {**r._asdict(), "error_frac": r.error_frac, "reference_error_frac": r.reference_error_frac} for r in v.rows
        ],
        "mean_abs_error_frac": v.mean_abs_error_frac,
        "extrapolated_frac": v.extrapolated_frac,
        "num_preemptions": v.num_preemptions,
        "num_shared_prompts": v.num_shared_prompts,
    }


def _table(v: Validation) -> str:
    lines = [str(v.folder), f"{'ms':<16}{'measured':>12}{'ours':>12}{'error':>9}{'LLMServingSim':>15}"]
    for r in v.rows:
        reference = "" if r.reference_error_frac is None else f"{r.reference_error_frac:+.2%}"
        name = f"{r.metric} {r.statistic}"
        lines.append(f"{name:<16}{r.measured_ms:>12.1f}{r.ours_ms:>12.1f}{r.error_frac:>+9.2%}{reference:>15}")
    lines.append(_verdict([v]))
    lines.append(
        f"{v.num_shared_prompts} prompts are known to begin as an earlier one; {v.num_preemptions} preemptions"
    )
    if v.extrapolated_frac:
        lines.append(f"{v.extrapolated_frac:.1%} of the steps are outside the profile's tables")
    return "\n".join(lines)


def _joint(found: Sequence[Validation]) -> list[str]:
    return [f"all {len(found)} folders: {_verdict(found)}"] if len(found) > 1 else []


def _verdict(found: Sequence[Validation]) -> str:
    rows = [r for v in found for r in v.rows]
    worst = max(rows, key=lambda r: abs(r.error_frac))
    ours = sum(abs(r.error_frac) for r in rows) / len(rows)
    references = [abs(r.reference_error_frac) for r in rows if r.reference_error_frac is not None]
    peer = f"; LLMServingSim {sum(references) / len(references):.2%}, {max(references):.2%}" if references else ""
    return f"mean absolute error {ours:.2%}, worst row {worst.metric} {worst.statistic} {worst.error_frac:+.2%}{peer}"


VALIDATIONS = {
    "measured": Check("a folder of a machine's profile and of what vLLM did on it", _measured_options, _measured),
}

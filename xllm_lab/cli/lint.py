"""The verb `lint`: what is wrong with a configuration of xLLM or vLLM-Ascend, and with `--fix` what is right."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_lab.errors import ConfigError
from xllm_lab.known_models import known_model
from xllm_lab.model_spec import PRECISIONS, ModelSpec, read_model_spec

if TYPE_CHECKING:
    from xllm_lab.tuning.lint.finding import Finding
    from xllm_lab.tuning.lint.linter import Lint
    from xllm_lab.tuning.lint.settings import Situation


def options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "exit status: 0 nothing but notes; 1 errors or warnings (after --fix: those left); 2 no configuration"
    )
    parser.add_argument("config", type=Path, nargs="?", help="JSON, flagfile, YAML, or a text with the command line")
    parser.add_argument("--engine-version", metavar="V", help="of xLLM: a release, or the beginning of a commit")
    parser.add_argument("--platform", help="that xLLM was built for, if the file names no devices; else npu")
    parser.add_argument("--model", help="name or config.json, for what fits memory")
    parser.add_argument("--hardware", help="name or .toml, for what fits memory")
    parser.add_argument("--devices", type=int, metavar="N", help="of the instance; else as many as the file says")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="bf16", help="of weights")
    parser.add_argument("--concurrency", type=int, metavar="N", help="requests that are served at once")
    parser.add_argument("--request-tokens", type=int, metavar="N", help="prompt and output of a long request")
    parser.add_argument("--fix", action="store_true", help="repair what can be repaired, to --out or else stdout")
    parser.add_argument("--out", type=Path, help="new file for the repaired configuration")
    parser.add_argument("--in-place", action="store_true", help="write the repaired configuration over CONFIG")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="json is what --json prints")
    parser.add_argument("--rules", action="store_true", help="the table of rules, as the page of a manual")


def situation(o: argparse.Namespace) -> Situation:
    """What the options say beside the file. ConfigError or ModelError for names that nobody knows."""
    from xllm_lab.hardware import hardware
    from xllm_lab.tuning.lint.flag_table import LATEST, version_named
    from xllm_lab.tuning.lint.settings import Platform, Situation

    for name in ("devices", "concurrency", "request_tokens"):
        value = getattr(o, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, at least 1 is accepted")
    platform = (o.platform or "npu").upper()
    if platform not in Platform.__members__:
        accepted = ", ".join(name.lower() for name in Platform.__members__)
        raise ConfigError(f"--platform is {o.platform!r}, accepted: {accepted}")
    return Situation(
        version=version_named(o.engine_version or LATEST).name,
        platform=Platform[platform],
        concurrency=o.concurrency,
        request_tokens=o.request_tokens,
        model=None if o.model is None else _model(o.model),
        device=None if o.hardware is None else hardware(o.hardware),
        num_devices=o.devices,
        precision=PRECISIONS[o.precision],
    )


def _model(name_or_path: str) -> ModelSpec:
    """As `sim.machine.model_of`, which needs SimPy."""
    if name_or_path.endswith(".json") or Path(name_or_path).is_dir():
        return read_model_spec(name_or_path)
    return known_model(name_or_path)


def refuse_unclear(o: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not go together."""
    if o.config is None:
        raise ConfigError("give a configuration, or --rules for the table of rules")
    if (o.out is not None or o.in_place) and not o.fix:
        raise ConfigError("--out and --in-place are where --fix writes; accepted: with it")
    if o.out is not None and o.out.exists() and o.out.samefile(o.config):
        raise ConfigError(f"--out is {o.out}, the configuration itself; accepted: another file, or --in-place")
    if o.out is not None and o.in_place:
        raise ConfigError("--out and --in-place are two places; one is accepted")


def as_dict(found: Lint) -> dict[str, Any]:
    """Plain data: what it is, what was found, and what was repaired."""
    return {
        "config": found.config.path,
        "kind": str(found.config.kind),
        "form": str(found.config.form),
        "engine_version": found.situation.version,
        "is_clean": found.is_clean,
        "findings": [_finding(one) for one in found.findings],
        "repaired": [_finding(one) for one in found.repaired],
    }


def _finding(one: Finding) -> dict[str, Any]:
    return {
        "rule": one.rule,
        "severity": str(one.severity),
        "line": one.line,
        "names": list(one.names),
        "says": one.says,
        "source": one.source,
        "repair": None if one.repair is None else one.repair.as_text(),
    }


def as_text(found: Lint) -> str:
    """Two or three lines for each finding, then how many there are."""
    version = f" {found.situation.version}" if str(found.config.kind) == "xLLM" else ""
    blocks = [f"{found.config.path}: a {found.config.form} of {found.config.kind}{version}"]
    for told, findings in (("", found.findings), ("repaired: ", found.repaired)):
        for one in findings:
            where = found.config.path if one.line is None else f"{found.config.path}:{one.line}"
            lines = [f"{where}: {told}{one.severity}: {one.says} [{one.rule}]", f"    source: {one.source}"]
            if one.repair is not None:
                lines.append(f"    {'did' if told else 'fix'}: {one.repair.as_text()}")
            blocks.append("\n".join(lines))
    counts = Counter(str(one.severity) for one in found.findings)
    said = ", ".join(f"{num} {name}{'s' * (num != 1)}" for name, num in counts.items()) or "nothing found"
    return "\n".join((*blocks, said))

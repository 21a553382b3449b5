"""Configurations for the linter's tests: situations by name, and strategies for texts of every form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml
from hypothesis import strategies as st

from xllm_lab.hardware import hardware
from xllm_lab.known_models import known_model
from xllm_lab.tuning.lint.configuration import Configuration, Form, Kind
from xllm_lab.tuning.lint.finding import Severity
from xllm_lab.tuning.lint.flag_table import LATEST, XllmFlag, xllm_flags
from xllm_lab.tuning.lint.linter import Lint, lint
from xllm_lab.tuning.lint.reading import parse_configuration
from xllm_lab.tuning.lint.settings import Platform, Situation
from xllm_lab.tuning.lint.vllm_table import VllmOption, vllm_options

# Flags that no rule is about but those of single flags, and that every version has.
HARMLESS_FLAGS = ("num_threads", "num_request_handling_threads", "host", "etcd_ttl")
HARMLESS_ARGUMENTS = {"seed": 7, "port": 8123, "trust_remote_code": True, "served_model_name": "m", "dtype": "bfloat16"}


def situation(told: Mapping[str, Any]) -> Situation:
    """From plain data, as rules' examples have it."""
    fields = dict(told)
    if "model" in fields:
        fields["model"] = known_model(fields["model"])
    if "device" in fields:
        fields["device"] = hardware(fields["device"])
    if "platform" in fields:
        fields["platform"] = Platform[fields["platform"]]
    return Situation(**fields)


def looked_at(text: str, **told: Any) -> Lint:
    return lint(parse_configuration(text, "it"), situation(told))


def serious(found: Lint) -> set[str]:
    """Rules that found more than advice."""
    return {one.rule for one in found.findings if one.severity is not Severity.NOTE}


def beside(config: Configuration, extra: Mapping[str, Any]) -> str:
    """The configuration's text with further settings."""
    if config.form is Form.JSON:
        return json.dumps({**extra, **json.loads(config.text)})
    if config.form is Form.YAML:
        return (yaml.safe_dump(dict(extra)) if extra else "") + config.text
    return flagfile(extra) + config.text


def flagfile(values: Mapping[str, Any]) -> str:
    return "".join(f"--{name}={str(v).lower() if isinstance(v, bool) else v}\n" for name, v in values.items())


def harmless(kind: Kind, version: str) -> st.SearchStrategy[dict[str, Any]]:
    """Settings that break nothing."""
    if kind is Kind.VLLM:
        names = st.sets(st.sampled_from(sorted(HARMLESS_ARGUMENTS)))
        return names.map(lambda chosen: {name: HARMLESS_ARGUMENTS[name] for name in sorted(chosen)})
    flags = {name: valid(xllm_flags(version)[name]) for name in HARMLESS_FLAGS}
    return st.fixed_dictionaries({}, optional=flags)


def valid(flag: XllmFlag) -> st.SearchStrategy[Any]:
    """Values that a flag accepts."""
    if flag.bounds.choices:
        return st.sampled_from(flag.bounds.choices)
    if flag.type == "bool":
        return st.booleans()
    if flag.type == "string":
        return st.sampled_from(("", "here", "/models/m", "127.0.0.1:2379"))
    least, most = flag.nearest(-1e12), flag.nearest(1e12)
    if flag.type == "double":
        return st.floats(max(least, -100.0), min(most, 100.0))
    return st.integers(int(max(least, -100)), int(min(most, 100)))


_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=8),
    st.just("$VALUE"),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@st.composite
def xllm_values(draw: st.DrawFn, version: str = LATEST) -> dict[str, Any]:
    """Settings of xLLM, most of them right, some odd, some unknown."""
    known = xllm_flags(version)
    names = draw(st.lists(st.sampled_from(sorted(known)), max_size=12, unique=True))
    values: dict[str, Any] = {"host": "127.0.0.1"}
    values |= {name: draw(st.one_of(valid(known[name]), valid(known[name]), _ODD)) for name in names}
    if draw(st.booleans()):
        values[draw(st.sampled_from(("enable_acl_graph", "max_seq_per_batch", "colour", "use_mix_scheduler")))] = draw(
            _ODD
        )
    return values


def _option_value(option: VllmOption) -> st.SearchStrategy[Any]:
    if option.choices:
        return st.sampled_from(option.choices)
    return {
        "bool": st.booleans(),
        "int": st.integers(0, 100),
        "float": st.floats(0, 2),
        "table": st.just({}),
        "list": st.just([1]),
    }.get(option.type, st.sampled_from(("fcfs", "x")))


@st.composite
def vllm_values(draw: st.DrawFn) -> dict[str, Any]:
    """A document of vLLM-Ascend, nested as it is written."""
    known = vllm_options()
    document: dict[str, Any] = {"max_num_seqs": 64, "gpu_memory_utilization": 0.9}
    for name in draw(st.lists(st.sampled_from(sorted(known)), max_size=12, unique=True)):
        value = draw(st.one_of(_option_value(known[name]), _option_value(known[name]), _ODD))
        *tables, last = name.split(".")
        table = document
        for key in tables:
            inner = table.get(key)
            table[key] = inner if isinstance(inner, dict) else {}
            table = table[key]
        table[last] = value
    if draw(st.booleans()):
        inner = document.get("additional_config")
        document["additional_config"] = {**(inner if isinstance(inner, dict) else {}), "refesh": True, "profil": 3}
    return document


def _as_flags(values: Mapping[str, Any], between: str) -> str:
    words = (str(v).lower() if isinstance(v, bool) else str(v) for v in values.values())
    quoted = ("'" + word.replace("'", "").replace("\n", " ") + "'" for word in words)
    return between.join(f"--{name}={word}" for name, word in zip(values, quoted, strict=True))


def texts() -> st.SearchStrategy[str]:
    """Texts of every form, of both kinds."""
    return st.one_of(
        xllm_values().map(json.dumps),
        xllm_values().map(lambda values: _as_flags(values, "\n")),
        xllm_values().map(lambda values: "xllm \\\n  " + _as_flags(values, " \\\n  ") + " > log 2>&1"),
        vllm_values().map(lambda values: str(yaml.safe_dump(values, sort_keys=False))),
        vllm_values().map(json.dumps),
        vllm_values().map(
            lambda values: (
                "vllm serve m "
                + " ".join(
                    f"--{name.replace('_', '-')} '{json.dumps(value) if isinstance(value, dict) else value}'"
                    for name, value in values.items()
                    if "'" not in str(value)
                )
            )
        ),
    )


def situations() -> st.SearchStrategy[Situation]:
    """What may be known beside a configuration."""
    return st.fixed_dictionaries(
        {},
        optional={
            "version": st.sampled_from(("0.7.2", "0.9.1", "0.10.0", "87e8d6ed6", LATEST)),
            "concurrency": st.integers(1, 500),
            "request_tokens": st.integers(1, 100_000),
            "model": st.sampled_from(("qwen3-14b", "qwen3-30b-a3b", "deepseek-v3")),
            "device": st.sampled_from(("ascend-910b4", "h200")),
            "platform": st.sampled_from(("NPU", "MLU")),
        },
    ).map(situation)

"""Rules about single flags of xLLM: names, types, ranges, and places where a flag is not read."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any

from xllm_lab.tuning.lint.configuration import Entry, Form, Kind
from xllm_lab.tuning.lint.finding import Repair, Severity, told_value
from xllm_lab.tuning.lint.flag_table import XllmFlag, versions_with, xllm_flags
from xllm_lab.tuning.lint.rules import VERSION_NAMES, Found, Rule, versions_between
from xllm_lab.tuning.lint.settings import Settings

# The same flag under a later name.
_RENAMED = {
    "enable_acl_graph": "enable_graph",
    "enable_acl_graph_no_padding": "enable_graph_mode_decode_no_padding",
    "enable_graph_no_padding": "enable_graph_mode_decode_no_padding",
}
_GFLAGS = "gflags 2.2 gflags.cc (ParseNewCommandLineFlags); https://gflags.github.io/gflags/#commandline"
_JSON = "xllm@3906f5a91 xllm/core/framework/config/config_utils.h:69"
_JSON_VALUE = "xllm@3906f5a91 xllm/core/util/json_reader.h:86"
# Flags of gflags itself and of glog, and of `xllm serve` (xllm/launch_server.py:117 at 3906f5a91).
_OF_OTHERS = frozenset(("flagfile", "fromenv", "tryfromenv", "undefok", "help", "h", "version", "v", "vmodule"))
_OF_OTHERS |= {"logtostderr", "alsologtostderr", "log_dir", "minloglevel", "stderrthreshold"}
_OF_OTHERS |= {"enable_auto_tuning_gflags", "start_port", "machine_rank", "no_log_files", "binary_path", "dry_run"}


def _flags(settings: Settings) -> dict[str, XllmFlag]:
    return xllm_flags(settings.situation.version)


def _variable(entry: Entry) -> bool:
    """Whether a shell puts the value in."""
    return isinstance(entry.value, str) and "$" in entry.value


def _unknown(settings: Settings) -> Iterator[Found]:
    version, known = settings.situation.version, _flags(settings)
    for name in settings.config.entries:
        if name in known or name in _OF_OTHERS:
            continue
        later = _RENAMED.get(name, "")
        if later not in known or settings.says(later):
            later = ""
        near = difflib.get_close_matches(name, known, 1, 0.8)
        held = versions_with(name)
        if later:
            why, repair = f"it is {later} now", Repair(renamed={name: later})
        elif held:
            last = held[-1] if VERSION_NAMES.index(held[-1]) < VERSION_NAMES.index(version) else ""
            why = f"{last} was the last here to have it" if last else f"it came with {held[0]}"
            repair = Repair(removed=(name,))
        elif near and not settings.says(near[0]):
            why, repair = f"the nearest is {near[0]}", Repair(renamed={name: near[0]})
        else:
            why, repair = "no flag has a name like it", Repair(removed=(name,))
        yield Found(f"xLLM {version} has no flag {name}: {why}", (name,), repair)


def _unknown_flag(settings: Settings) -> Iterator[Found]:
    if settings.config.is_flags:
        for found in _unknown(settings):
            yield found._replace(says=f"{found.says}; gflags ends the program at an unknown flag")


def _unknown_key(settings: Settings) -> Iterator[Found]:
    if settings.config.form is Form.JSON:
        for found in _unknown(settings):
            yield found._replace(says=f"{found.says}; xLLM asks its file for names it knows, and never sees this one")


def _wrong_type(settings: Settings) -> Iterator[Found]:
    for name, entry in settings.config.entries.items():
        flag = _flags(settings).get(name)
        if flag is None or _variable(entry):
            continue
        if settings.config.is_flags:
            if entry.value is True:
                yield Found(f"{name} has no value; gflags ends the program without one", (name,), None, _GFLAGS)
            elif flag.parsed(str(entry.value)) is None:
                says = (
                    f"{name} is {entry.value!r}; gflags accepts {flag.accepted} and ends the program at anything else"
                )
                yield Found(says, (name,), Repair(removed=(name,)), _GFLAGS)
        elif _is_refused(flag, entry.value):
            says = f"{name} is {entry.value!r}, in JSON a {_json_type(entry.value)}; {flag.accepted} are accepted, and "
            yield Found(says + "the exception of anything else ends the program", (name,), _typed(flag, entry.value))


def _is_refused(flag: XllmFlag, value: Any) -> bool:
    if value is None or isinstance(value, dict) or flag.is_of_type(value):
        return False
    return not (flag.type not in ("bool", "string") and isinstance(value, bool | float))


def _json_type(value: Any) -> str:
    return {bool: "boolean", str: "text", list: "list"}.get(type(value), "number")


def _typed(flag: XllmFlag, value: Any) -> Repair:
    """What was meant, if the text of the value says it."""
    if flag.type == "string" and not isinstance(value, list):
        return Repair(put={flag.name: told_value(value)})
    parsed = flag.parsed(told_value(value))
    if parsed is None or not flag.is_within(parsed):
        return Repair(removed=(flag.name,))
    return Repair(put={flag.name: parsed})


def _converted(settings: Settings) -> Iterator[Found]:
    """JSON numbers that become others on their way: true is 1, and 3.7 is 3."""
    for name, entry in settings.config.entries.items():
        flag, value = _flags(settings).get(name), entry.value
        if settings.config.is_flags or flag is None or flag.type in ("bool", "string") or flag.is_of_type(value):
            continue
        if isinstance(value, bool | float):
            if isinstance(value, float) and not math.isfinite(value):
                repair = Repair(removed=(name,))
            else:
                number = flag.nearest(int(value))
                repair = Repair(put={name: float(number) if flag.type == "double" else int(number)})
            yield Found(
                f"{name} is {told_value(value)}; xLLM turns it into a {flag.type} and says nothing", (name,), repair
            )


def _nothing(settings: Settings) -> Iterator[Found]:
    if settings.config.form is Form.JSON:
        for name, entry in settings.config.entries.items():
            if name in _flags(settings) and (entry.value is None or isinstance(entry.value, dict)):
                kind = "null" if entry.value is None else "an object"
                says = f"{name} is {kind}, which xLLM passes over as if the name were not there"
                yield Found(says, (name,), Repair(removed=(name,)))


def _out_of_range(settings: Settings) -> Iterator[Found]:
    for name, entry in settings.config.entries.items():
        flag = _flags(settings).get(name)
        if flag is None or _variable(entry) or (entry.value is True and settings.config.is_flags):
            continue
        value = flag.parsed(str(entry.value)) if settings.config.is_flags else entry.value
        if value is None or not flag.is_of_type(value) or flag.is_within(value):
            continue
        says = f"{name} is {value}; {flag.accepted} {'is' if flag.bounds.choices else 'are'} accepted"
        yield Found(says, (name,), _within(flag, value), flag.bounds.source or flag.source)


def _within(flag: XllmFlag, value: Any) -> Repair:
    if flag.bounds.choices:
        same = [choice for choice in flag.bounds.choices if choice.lower() == str(value).lower()]
        near = same or difflib.get_close_matches(str(value), flag.bounds.choices, 1, 0.7)
        return Repair(put={flag.name: near[0]}) if near else Repair(removed=(flag.name,))
    return Repair(put={flag.name: flag.nearest(value)}) if math.isfinite(value) else Repair(removed=(flag.name,))


def _twice(settings: Settings) -> Iterator[Found]:
    for name in dict.fromkeys(entry.name for entry in settings.config.earlier):
        lines = [str(e.line) for e in settings.config.earlier if e.name == name]
        last = settings.line(name)
        says = f"{name} is there {len(lines) + 1} times; the last, on line {last}, counts, not line {', '.join(lines)}"
        yield Found(says, (name,), Repair(only_last=(name,)))


def _spare_word(settings: Settings) -> Iterator[Found]:
    for name, entry in settings.config.entries.items():
        if entry.spare and name in _flags(settings):
            meant = _flags(settings)[name].parsed(entry.spare)
            says = f"{name} is true, whatever follows: gflags reads a boolean's value only behind =, and passes over "
            repair = Repair(put={name: True if meant is None else meant})
            yield Found(f"{says}{entry.spare!r}", (name,), repair)


def _not_in_json(settings: Settings) -> Iterator[Found]:
    if settings.config.form is Form.JSON and settings.situation.version in _WITH_JSON:
        for name in settings.config.entries:
            flag = _flags(settings).get(name)
            if flag is not None and not flag.is_in_json and name not in _LAUNCHED:
                says = f"{name} is read from the command line only; in the file it does nothing"
                yield Found(says, (name,), Repair(removed=(name,)), flag.source)


def _json_too_early(settings: Settings) -> Iterator[Found]:
    if settings.config.form is Form.JSON and settings.config.entries:
        first = next(iter(settings.config.entries))
        says = f"xLLM {settings.situation.version} reads no JSON: --config_json_file came with {_WITH_JSON[0]}"
        yield Found(says, (first,))


# The launcher reads it from the file and puts it on the command line (xllm/launch_server.py:232 at 3906f5a91).
_LAUNCHED = ("port",)
_WITH_JSON = tuple(versions_with("config_json_file"))


def _rule(name: str, severity: Severity, **more: Any) -> Rule:
    return Rule(id=name, kind=Kind.XLLM, severity=severity, **more)


RULES = (
    _rule(
        "unknown-flag",
        Severity.ERROR,
        what="a flag that this version does not have",
        source=_GFLAGS,
        finds=_unknown_flag,
        example="--enable_acl_graph=true",
    ),
    _rule(
        "unknown-key",
        Severity.WARNING,
        what="a name in the JSON file that xLLM never asks for",
        source=_JSON,
        finds=_unknown_key,
        example='{"max_seqs_per_bacth": 64}',
    ),
    _rule(
        "wrong-type",
        Severity.ERROR,
        what="a value that ends the program as it starts",
        source=_JSON_VALUE,
        finds=_wrong_type,
        example='{"max_seqs_per_batch": "64"}',
    ),
    _rule(
        "converted",
        Severity.WARNING,
        what="a JSON number that becomes another without a word",
        source=_JSON_VALUE,
        finds=_converted,
        example='{"max_seqs_per_batch": 63.5}',
    ),
    _rule(
        "null-or-object",
        Severity.WARNING,
        what="a JSON value that is passed over",
        source="xllm@3906f5a91 xllm/core/util/json_reader.h:82",
        finds=_nothing,
        example='{"max_seqs_per_batch": null}',
    ),
    _rule(
        "out-of-range",
        Severity.ERROR,
        what="a value that this flag cannot have",
        source="xllm_bounds.csv",
        finds=_out_of_range,
        example="--max_memory_utilization=90",
    ),
    _rule(
        "flag-twice",
        Severity.WARNING,
        what="a flag that is set more than once",
        source=_GFLAGS,
        finds=_twice,
        example="--block_size=64\n--block_size=128",
    ),
    _rule(
        "boolean-with-word",
        Severity.WARNING,
        what="a boolean whose value is a word of its own",
        source=_GFLAGS,
        finds=_spare_word,
        example="--enable_prefix_cache false",
    ),
    _rule(
        "not-in-json",
        Severity.WARNING,
        what="a flag that is not read from the JSON file",
        source=_JSON,
        finds=_not_in_json,
        example='{"node_rank": 1}',
    ),
    _rule(
        "json-too-early",
        Severity.ERROR,
        what="a JSON file for a version that reads none",
        source="xllm@5e814b188 xllm/core/framework/config/config_utils.cpp:48",
        finds=_json_too_early,
        example='{"block_size": 64}',
        versions=versions_between("", "0.9.1"),
        example_situation={"version": "0.9.1"},
        is_repaired=False,
    ),
)

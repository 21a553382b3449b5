"""Rules about single arguments of vLLM and options of vLLM-Ascend."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any

from xllm_lab.tuning.lint.configuration import Kind
from xllm_lab.tuning.lint.finding import Repair, Severity, told_value
from xllm_lab.tuning.lint.rules import Found, Rule
from xllm_lab.tuning.lint.settings import Settings
from xllm_lab.tuning.lint.vllm_table import ADDITIONAL, VllmOption, vllm_options

_ASCEND = "vllm-ascend@182b75ea vllm_ascend/"
_IN_ADDITIONAL = f"{ADDITIONAL}."
# Tables whose unknown keys raise; elsewhere they are passed over. `ascend_config.py` at these lines.
_STRICT = {"eplb_config": 1019, "rl_config": 566, "scheduler_config.short_request_first_config": 1075}
_STRICT["scheduler_config.dyntra_lb_config"] = 1114
# Keys that were taken out or moved, and have rules of their own.
_LEGACY = ("enable_balance_scheduling", "recompute_scheduler_enable", "short_request_first_config")
LEGACY = (*_LEGACY, "profiling_chunk_config")
GONE = ("enable_sleep_mode_extra_cleanup", "enable_flashcomm1")


def _strict(name: str) -> str:
    """The table with an eye on its keys that a name is in."""
    return next((table for table in _STRICT if name.startswith(f"{_IN_ADDITIONAL}{table}.")), "")


def _unknown(settings: Settings) -> Iterator[tuple[str, str]]:
    """Options that are in no table, with the nearest that is in the same one."""
    known = vllm_options()
    for name in settings.config.entries:
        if not name.startswith(_IN_ADDITIONAL) or name in known:
            continue
        table, _, key = name.rpartition(".")
        top = name.split(".")[1]
        if top in LEGACY or top in GONE or not _holds_keys(table):
            continue
        keys = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == table]
        near = difflib.get_close_matches(key, keys, 1, 0.75)
        yield name, f"{table}.{near[0]}" if near and not settings.says(f"{table}.{near[0]}") else ""


def _holds_keys(table: str) -> bool:
    """Whether the keys of a table are known, which those of a user's own dictionary are not."""
    return any(name.rpartition(".")[0] == table for name in vllm_options())


def _repair(name: str, near: str) -> Repair:
    return Repair(renamed={name: near}) if near else Repair(removed=(name,))


def _nearest(near: str) -> str:
    return f"; the nearest is {near.removeprefix(_IN_ADDITIONAL)}" if near else ""


def _passed_over(settings: Settings) -> Iterator[Found]:
    for name, near in _unknown(settings):
        if not _strict(name):
            says = f"{name} is no option: vLLM-Ascend asks for those it knows, and never sees it{_nearest(near)}"
            yield Found(says, (name,), _repair(name, near))


def _raises(settings: Settings) -> Iterator[Found]:
    for name, near in _unknown(settings):
        if table := _strict(name):
            says = f"{name} is no option of {table}, which ends the program{_nearest(near)}"
            yield Found(says, (name,), _repair(name, near), f"{_ASCEND}ascend_config.py:{_STRICT[table]}")


def _misspelt(settings: Settings) -> Iterator[Found]:
    """Arguments near a known one. Our table is not all of vLLM's, so others pass."""
    known = [name for name in vllm_options() if "." not in name]
    for name in settings.config.entries:
        if "." in name or name in known:
            continue
        near = difflib.get_close_matches(name, known, 1, 0.85)
        if near and not settings.says(near[0]):
            says = f"{name} is no argument of vLLM as far as is known here; the nearest is {near[0]}"
            yield Found(says, (name,), Repair(renamed={name: near[0]}))


def _stranger(settings: Settings) -> Iterator[Found]:
    known = [name for name in vllm_options() if "." not in name]
    for name in settings.config.entries:
        if "." not in name and name not in known and not difflib.get_close_matches(name, known, 1, 0.85):
            yield Found(f"{name} is not in the table of vLLM's arguments here, which is not all of them", (name,))


def _variable(value: Any) -> bool:
    return isinstance(value, str) and "$" in value


def _wrong_type(settings: Settings) -> Iterator[Found]:
    for name, entry in settings.config.entries.items():
        option = vllm_options().get(name)
        if option is None or _variable(entry.value) or option.is_of_type(entry.value):
            continue
        if settings.config.is_flags and option.type in ("string", "list", "any"):
            continue  # a word is a text if one is wanted, and several are a list
        says = (
            f"{name} is {_shown(entry.value)}; {option.accepted} {'is' if option.type == 'string' else 'are'} accepted"
        )
        yield Found(says, (name,), _typed(option, entry.value), option.source)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _typed(option: VllmOption, value: Any) -> Repair:
    words = {"true": True, "false": False, "1": True, "0": False}
    if option.type == "bool" and str(value).lower() in words:
        return Repair(put={option.name: words[str(value).lower()]})
    if option.type in ("int", "float") and isinstance(value, str | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            return Repair(removed=(option.name,))
        if math.isfinite(number):
            return Repair(put={option.name: option.nearest(number)})
    if option.type == "string" and isinstance(value, bool | int | float):
        return Repair(put={option.name: told_value(value)})
    return Repair(removed=(option.name,))


def _out_of_range(settings: Settings) -> Iterator[Found]:
    for name, entry in settings.config.entries.items():
        option = vllm_options().get(name)
        if (
            option is None
            or not option.is_of_type(entry.value)
            or option.is_within(entry.value)
            or _variable(entry.value)
        ):
            continue
        near = difflib.get_close_matches(str(entry.value), option.choices, 1, 0.7)
        if option.choices:
            repair = Repair(put={name: near[0]}) if near else Repair(removed=(name,))
        elif math.isfinite(entry.value):
            repair = Repair(put={name: option.nearest(entry.value)})
        else:
            repair = Repair(removed=(name,))
        says = f"{name} is {told_value(entry.value)}; {option.accepted} {'is' if option.choices else 'are'} accepted"
        yield Found(says, (name,), repair, option.source)


def _twice(settings: Settings) -> Iterator[Found]:
    for name in dict.fromkeys(entry.name for entry in settings.config.earlier):
        lines = ", ".join(str(e.line) for e in settings.config.earlier if e.name == name)
        says = f"{name} is there more than once; the last, on line {settings.line(name)}, counts, not line {lines}"
        yield Found(says, (name,), Repair(only_last=(name,)))


def _rule(name: str, severity: Severity, **more: Any) -> Rule:
    return Rule(id=name, kind=Kind.VLLM, severity=severity, **more)


RULES = (
    _rule(
        "option-passed-over",
        Severity.WARNING,
        what="a key of additional_config that nobody asks for",
        source=f"{_ASCEND}ascend_config.py:52",
        finds=_passed_over,
        example="max_num_seqs: 64\nadditional_config:\n  enable_cpu_bindings: true",
    ),
    _rule(
        "option-unknown",
        Severity.ERROR,
        what="a key that ends the program",
        source=f"{_ASCEND}ascend_config.py:1019",
        finds=_raises,
        example="max_num_seqs: 64\nadditional_config:\n  eplb_config:\n    num_redundant_expert: 2",
    ),
    _rule(
        "argument-misspelt",
        Severity.WARNING,
        what="an argument that is nearly one of vLLM's",
        source="ascend_options.csv",
        finds=_misspelt,
        example="max_num_seqs: 64\nmax_model_length: 4096",
    ),
    _rule(
        "argument-unknown",
        Severity.NOTE,
        what="an argument that is not in the table here",
        source="ascend_options.csv",
        finds=_stranger,
        example="max_num_seqs: 64\nfrobnicate: 3",
        is_repaired=False,
    ),
    _rule(
        "option-type",
        Severity.ERROR,
        what="a value of another type",
        source="ascend_options.csv",
        finds=_wrong_type,
        example="max_num_seqs: many\nblock_size: 128",
    ),
    _rule(
        "option-range",
        Severity.ERROR,
        what="a value that is not accepted",
        source="ascend_options.csv",
        finds=_out_of_range,
        example="max_num_seqs: 64\ngpu_memory_utilization: 90",
    ),
    _rule(
        "option-twice",
        Severity.WARNING,
        what="a name that is there more than once",
        source="PyYAML 6 constructor.py (construct_mapping)",
        finds=_twice,
        example="max_num_seqs: 64\nblock_size: 64\nblock_size: 128",
    ),
)

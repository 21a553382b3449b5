"""Finds every policy and reads its knobs. Nothing registers itself here, and nothing is listed twice.

A policy is any public dataclass with a `decides` attribute in a module of `xllm_lab.policies`, or in a module that
another installed package names under the entry-point group `xllm_lab.policies`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil
import re
import types
import typing
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

import xllm_lab.policies as package
from xllm_lab.errors import ConfigError
from xllm_lab.policies.api import Around, Choice, FewerThan, Flag, Knob, Needs

ENTRY_POINT_GROUP = "xllm_lab.policies"


def policies(decides: str = "batch") -> dict[str, type[Any]]:
    """All policy classes for one decision by name, in order of name."""
    found = {policy_name(c): c for c in _classes() if c.decides == decides}
    return dict(sorted(found.items()))


def decisions() -> tuple[str, ...]:
    """Every kind of decision that some policy makes, in order of name."""
    return tuple(sorted({c.decides for c in _classes()}))


def policy_name(policy: type[Any] | object) -> str:
    """`DecodeFirst` -> `decode-first`."""
    cls = policy if isinstance(policy, type) else type(policy)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()


def make_policy(decides: str, name: str, values: Mapping[str, Any] | None = None) -> Any:
    """Build a policy for one decision; ConfigError names an unknown policy or knob and what is accepted."""
    return configured(policy_class(decides, name), values or {})


def policy_class(decides: str, name: str) -> type[Any]:
    """The policy of that name; ConfigError if there is none."""
    known = policies(decides)
    if name not in known:
        raise ConfigError(f"unknown {decides} policy {name!r}; accepted: {', '.join(known)}")
    return known[name]


T = typing.TypeVar("T")


def configured(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance of a dataclass of knobs. Strings are read as the field's type.

    Raises:
        ConfigError: an unknown field, or a value that its type or the class refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    ready: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"{policy_name(cls)} has no knob {name!r}; accepted: {', '.join(fields) or 'none'}")
        ready[name] = _as_type(name, value, fields[name])
    try:
        return cls(**ready)
    except ValueError as error:
        raise ConfigError(f"{policy_name(cls)}: {error}") from None


def fields_of(cls: type[Any]) -> tuple[str, ...]:
    """The fields of a dataclass that a value can be given for, in order of definition."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.init)


def knobs(cls: type[Any]) -> dict[str, Knob | Choice]:
    """The searchable fields of a dataclass, in order of definition."""
    return {name: note for name, note in _notes(cls) if isinstance(note, Knob | Choice)}


def knobs_with_effect(cls: type[Any], around: Mapping[Around, int]) -> dict[str, Knob | Choice]:
    """Of the knobs, those that do something among so many of each, and as far as they do: see `Needs`, `FewerThan`."""
    found = knobs(cls)
    for name, note in _notes(cls):
        if isinstance(note, Needs) and around.get(note.around, 0) < note.at_least:
            found.pop(name, None)
        elif isinstance(note, FewerThan) and isinstance(knob := found.get(name), Knob):
            found[name] = dataclasses.replace(knob, high=min(knob.high, around.get(note.around, 0) - 1))
    return {name: knob for name, knob in found.items() if isinstance(knob, Choice) or knob.low < knob.high}


def flags(cls: type[Any]) -> dict[str, Flag]:
    """The fields of a dataclass that xLLM has a flag for, in order of definition."""
    return {name: note for name, note in _notes(cls) if isinstance(note, Flag)}


def values_of(instance: object) -> dict[str, Any]:
    """All fields of a dataclass instance as plain data, for manifests and exports."""
    assert dataclasses.is_dataclass(instance)
    assert not isinstance(instance, type)
    return dataclasses.asdict(instance)


def _notes(cls: Any) -> tuple[tuple[str, Any], ...]:
    return _notes_of(cls)


@functools.cache
def _notes_of(cls: Any) -> tuple[tuple[str, Any], ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)
    return tuple((f.name, note) for f in fields for note in getattr(hints[f.name], "__metadata__", ()))


def _as_type(name: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if type(None) in options:
            return None
        raise ConfigError(f"{name} is {value!r}, accepted: {_type_name(hint)}")
    wanted = next(o for o in options if o is not type(None))
    if wanted is bool:
        table = {"true": True, "1": True, "false": False, "0": False}
        if str(value).lower() in table:
            return table[str(value).lower()]
    elif wanted in (int, float, str):
        try:
            as_number = float(value) if wanted is not str else 0.0
            if not math.isfinite(as_number) or (wanted is int and as_number != int(as_number)):
                raise ValueError
            return wanted(value) if wanted is not int else int(as_number)
        except (TypeError, ValueError, OverflowError):
            pass
    else:
        return value
    raise ConfigError(f"{name} is {value!r}, accepted: {_type_name(hint)}")


def _type_name(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint))


def _classes() -> tuple[type[Any], ...]:
    return _classes_of(_modules())


# A search asks for every trial anew, which took longer than to simulate it.
@functools.cache
def _classes_of(modules: tuple[types.ModuleType, ...]) -> tuple[type[Any], ...]:
    return tuple(_found_in(modules))


def _found_in(modules: tuple[types.ModuleType, ...]) -> Iterator[type[Any]]:
    for module in modules:
        for _, cls in inspect.getmembers(module, inspect.isclass):
            is_policy = dataclasses.is_dataclass(cls) and isinstance(getattr(cls, "decides", None), str)
            if is_policy and cls.__module__ == module.__name__ and not cls.__name__.startswith("_"):
                yield cls


@functools.cache
def _modules() -> tuple[types.ModuleType, ...]:
    own = sorted(m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + "."))
    other = sorted(e.value for e in entry_points(group=ENTRY_POINT_GROUP))
    return tuple(importlib.import_module(name) for name in (*own, *other))

"""The rules, one row each: what it looks for, how bad that is, and on which line of whose code it rests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xllm_lab.tuning.lint.configuration import Form, Kind
from xllm_lab.tuning.lint.finding import Repair, Severity, told_value
from xllm_lab.tuning.lint.flag_table import LATEST, VERSIONS
from xllm_lab.tuning.lint.settings import Platform, Settings

VERSION_NAMES = tuple(version.name for version in VERSIONS)


class Found(NamedTuple):
    """A case of a rule.

    Attributes:
        names: settings it is about, the one to point at first.
        source: if the case has a closer one than its rule.
    """

    says: str
    names: tuple[str, ...]
    repair: Repair | None = None
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the table.

    Attributes:
        what: what it finds, in a phrase.
        source: file and line it rests on; the cases of some rules have one of their own.
        finds: its cases in given settings.
        versions: of xLLM that it holds for.
        example: a configuration that breaks it and no other rule.
        example_situation: what else the example needs, as `Situation`'s fields; models and devices by name.
        is_repaired: whether the example can be repaired.
    """

    id: str
    kind: Kind
    severity: Severity
    what: str
    source: str
    finds: Callable[[Settings], Iterator[Found]]
    example: str
    versions: tuple[str, ...] = VERSION_NAMES
    example_situation: Mapping[str, Any] = field(default_factory=dict)
    is_repaired: bool = True

    @property
    def every_version(self) -> tuple[str, ...]:
        return VERSION_NAMES

    def applies(self, settings: Settings) -> bool:
        """Whether it is about this kind and version."""
        if settings.config.kind is not self.kind:
            return False
        return self.kind is Kind.VLLM or settings.situation.version in self.versions


class _Told(dict[str, str]):
    """Values for the sentence of a finding, as a command line has them."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings

    def __missing__(self, name: str) -> str:
        if name == "last":
            return self._settings.situation.version
        return told_value(self._settings[name])


def versions_between(since: str, until: str) -> tuple[str, ...]:
    """Versions by date, both ends included; empty is the first, and the last."""
    first = VERSION_NAMES.index(since) if since else 0
    last = VERSION_NAMES.index(until) if until else len(VERSION_NAMES) - 1
    return VERSION_NAMES[first : last + 1]


def conflict(
    name: str,
    severity: Severity,
    names: Sequence[str],
    *,
    when: Callable[[Settings], Any],
    says: str,
    source: str,
    example: str,
    what: str,
    put: Mapping[str, Any] | Callable[[Settings], Mapping[str, Any]] | None = None,
    removed: tuple[str, ...] = (),
    since: str = "",
    until: str = "",
    platforms: tuple[Platform, ...] = tuple(Platform),
    forms: tuple[Form, ...] = tuple(Form),
    kind: Kind = Kind.XLLM,
    situation: Mapping[str, Any] | None = None,
) -> Rule:
    """A rule about settings that do not go together: it holds where all of them are known, and `when` is true.

    Args:
        names: the settings that `when` looks at, the one to blame first.
        says: the finding's sentence; {name} is a value in force.
        put, removed: the repair, if there is one.
    """

    def finds(settings: Settings) -> Iterator[Found]:
        if settings.config.form not in forms or settings.platform not in platforms:
            return
        if all(map(settings.is_known, names)) and when(settings):
            values = put(settings) if callable(put) else (put or {})
            gone = tuple(filter(settings.says, removed))
            repair = Repair(put=values, removed=gone) if values or gone else None
            yield Found(says.format_map(_Told(settings)), tuple(names) or gone, repair)

    versions = versions_between(since, until)
    context = {"version": LATEST if LATEST in versions else versions[-1], **(situation or {})}
    return Rule(
        id=name,
        kind=kind,
        severity=severity,
        what=what,
        source=source,
        finds=finds,
        example=example,
        versions=versions,
        example_situation=context if kind is Kind.XLLM else dict(situation or {}),
        is_repaired=bool(put or removed),
    )


def drafts_on(settings: Settings) -> bool:
    """Whether xLLM drafts at all."""
    return bool(settings["num_speculative_tokens"] > 0)


def says_on(settings: Settings, name: str) -> bool:
    """Whether the file itself turns something on."""
    return settings.says(name) and bool(settings[name])


def every_rule() -> tuple[Rule, ...]:
    """All rules, in the order of the manual."""
    from xllm_lab.tuning.lint.rules import (
        ascend,
        ascend_schedulers,
        drafts,
        graphs,
        kv,
        memory,
        options,
        parallel,
        scheduling,
        xllm_flags,
    )

    of_xllm = (xllm_flags, scheduling, graphs, kv, parallel, drafts)
    return tuple(rule for module in (*of_xllm, options, ascend_schedulers, ascend, memory) for rule in module.RULES)

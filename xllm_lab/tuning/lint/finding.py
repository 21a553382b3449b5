"""What the linter says: findings, and the repairs that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """How bad it is. Notes are advice: a configuration with nothing else is clean."""

    ERROR = "error"  # does not start, crashes, or cannot fit
    WARNING = "warning"  # starts, and does not do what it says
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """A change of the configuration after which the rule is silent.

    Attributes:
        put: names and their new values.
        removed: names that go; their defaults do the same.
        renamed: names that keep their value under another name.
        only_last: names of which all but the last mention go.
    """

    put: Mapping[str, Any] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    only_last: tuple[str, ...] = ()

    def as_text(self) -> str:
        """In a few words."""
        told = [f"{name}={told_value(value)}" for name, value in self.put.items()]
        told += [f"without {name}" for name in self.removed]
        told += [f"{old} becomes {new}" for old, new in self.renamed.items()]
        told += [f"{name} once" for name in self.only_last]
        return ", ".join(told)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a rule found.

    Attributes:
        rule: its id.
        says: why it is wrong, with the values.
        source: file and line, issue or document that the rule rests on.
        names: the settings it is about.
        line: of the configuration, from 1; None if the setting is not there.
        repair: None if only its author can tell what was meant.
    """

    rule: str
    severity: Severity
    says: str
    source: str
    names: tuple[str, ...]
    line: int | None = None
    repair: Repair | None = None


def told_value(value: Any) -> str:
    """A value as a command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)

"""A configuration that was read: whose it is, in which form, and what it sets where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class Kind(StrEnum):
    """Whose configuration it is."""

    XLLM = "xLLM"
    VLLM = "vLLM-Ascend"


class Form(StrEnum):
    """How it is written."""

    JSON = "JSON"
    YAML = "YAML"
    FLAGFILE = "flagfile"
    COMMAND = "command line"


class Entry(NamedTuple):
    """One setting.

    Attributes:
        name: as the tables have it; those of a nested table are joined by dots.
        value: from flags, the text as it stands, or True where there is none.
        line: in the file, from 1.
        span: of flags, where in the text it begins and ends.
        spare: of flags, the word that follows a boolean, which gflags does not take for its value.
    """

    name: str
    value: Any
    line: int
    span: tuple[int, int] = (0, 0)
    spare: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What a file sets.

    Attributes:
        entries: by name; of one that is set several times the last.
        earlier: the other mentions, in order.
        document: of JSON and YAML, all of it.
        packed: names in the document whose value is a table that was written as a text of JSON.
    """

    path: str
    text: str
    kind: Kind
    form: Form
    entries: Mapping[str, Entry]
    earlier: tuple[Entry, ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict)
    packed: frozenset[str] = frozenset()

    @property
    def is_flags(self) -> bool:
        return self.form in (Form.FLAGFILE, Form.COMMAND)

"""Arguments of vLLM and options of vLLM-Ascend's `additional_config`, from `ascend_options.csv`.

vLLM-Ascend at 182b75ea (2026-08-22), for vLLM 0.27.1. Options are all there are. Arguments are those that it, its
documentation or its tests use, so an argument that is not in the table may still be one.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from xllm_lab.errors import ConfigError

OPTIONS_FILE = Path(__file__).with_name("ascend_options.csv")
COLUMNS = ("name", "type", "default", "least", "most", "choices", "source")
ADDITIONAL = "additional_config"
# Of numbers without bounds: fractions, and whole ones.
_MOST = (math.inf, 2.0**62)
_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "string": (str,),
    "table": (dict,),
    "list": (list,),
    "any": (object,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOption:
    """An argument by its Python name, or an option by its path; numbers are accepted from `least` to `most`."""

    name: str
    type: str
    default: Any
    least: float
    most: float
    choices: tuple[str, ...]
    source: str

    @property
    def accepted(self) -> str:
        """What is accepted, in words."""
        if self.choices:
            return ", ".join(self.choices)
        kind = {"bool": "true, false", "table": "a table", "list": "a list", "string": "text", "any": "anything"}.get(
            self.type, "numbers" if self.type == "float" else "whole numbers"
        )
        least = f" of at least {self.least:g}" if self.least not in (-_MOST[0], -_MOST[1]) else ""
        return f"{kind}{least}" + (f" and at most {self.most:g}" if self.most not in _MOST else "")

    def is_of_type(self, value: Any) -> bool:
        """Whether a value read from YAML is one; null leaves the default."""
        if value is None or self.type == "any":
            return True
        return isinstance(value, _TYPES[self.type]) and (self.type == "bool" or not isinstance(value, bool))

    def is_within(self, value: Any) -> bool:
        """Whether a value of the type is accepted."""
        if value is None:
            return True
        if self.choices:
            return str(value) in self.choices
        return self.type not in ("int", "float") or bool(self.least <= value <= self.most)

    def nearest(self, value: float) -> int | float:
        """The accepted number next to one outside the range."""
        found = min(max(value, self.least), self.most)
        return int(found) if self.type == "int" else found


@cache
def vllm_options() -> dict[str, VllmOption]:
    """Every argument and option by name."""
    found: dict[str, VllmOption] = {}
    with OPTIONS_FILE.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == COLUMNS, reader.fieldnames
        for row in reader:
            assert row["type"] in _TYPES, row
            assert row["source"], row
            assert row["name"] not in found, row
            found[row["name"]] = VllmOption(
                name=row["name"],
                type=row["type"],
                default=_default(row["type"], row["default"]),
                least=float(row["least"] or -_MOST[row["type"] == "int"]),
                most=float(row["most"] or _MOST[row["type"] == "int"]),
                choices=tuple(row["choices"].split("|")) if row["choices"] else (),
                source=row["source"],
            )
    return found


def refuse_unsayable(config: Mapping[str, Any]) -> None:
    """Raise ConfigError unless every argument is in the table, of its type and accepted."""
    for name, value in config.items():
        option = vllm_options().get(name)
        if option is None:
            raise ConfigError(f"{name} is no argument of vLLM as far as is known here")
        if not option.is_of_type(value) or not option.is_within(value):
            raise ConfigError(f"{name} is {value!r}; {option.accepted} are accepted ({option.source})")


def _default(kind: str, told: str) -> Any:
    if not told:
        return None
    return {"bool": lambda: told == "true", "int": lambda: int(told), "float": lambda: float(told)}.get(
        kind, lambda: told
    )()


# Arguments whose value is a table, or a text of JSON that holds one.
SECTIONS = frozenset(
    ("additional_config", "kv_transfer_config", "speculative_config", "eplb_config", "compilation_config")
)

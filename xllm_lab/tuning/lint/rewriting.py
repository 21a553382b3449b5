"""Repairs applied to a configuration's text. Flags are changed in their place; JSON and YAML are written anew."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from xllm_lab.tuning.lint.configuration import Configuration, Entry, Form, Kind
from xllm_lab.tuning.lint.finding import Repair, told_value


def rewritten(config: Configuration, repair: Repair) -> str:
    """The text with one repair made. YAML loses its comments, JSON its layout."""
    if config.is_flags:
        return _flags(config, repair)
    document = _document(config, repair)
    whole = {name: json.dumps(value) if name in config.packed else value for name, value in document.items()}
    if config.form is Form.JSON:
        return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    return str(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=120))


def _document(config: Configuration, repair: Repair) -> dict[str, Any]:
    """The document with the repair made. xLLM's names are flat, whatever dots are in them."""
    document = copy.deepcopy(dict(config.document))
    nests = config.kind is Kind.VLLM

    def table_of(name: str, make: bool) -> tuple[dict[str, Any] | None, str]:
        if not nests or name in document:
            return document, name
        table: dict[str, Any] = document
        *outer, last = name.split(".")
        for key in outer:
            if not isinstance(table.get(key), dict):
                if not make:
                    return None, last
                table[key] = {}
            table = table[key]
        return table, last

    for old, new in repair.renamed.items():
        table, key = table_of(old, make=False)
        if table is not None and key in table:
            target, renamed = table_of(new, make=True)
            assert target is not None
            target[renamed] = table.pop(key)
    for name in repair.removed:
        table, key = table_of(name, make=False)
        if table is not None:
            table.pop(key, None)
    for name, value in repair.put.items():
        table, key = table_of(name, make=True)
        assert table is not None
        table[key] = value
    return document


def _flags(config: Configuration, repair: Repair) -> str:
    """Edits of the text, from its end to its beginning so that places stay what they are."""
    own = {name: entry for name, entry in config.entries.items() if entry.span[1]}
    edits: list[tuple[int, int, str]] = [(*e.span, "") for e in config.earlier if e.name in repair.only_last]
    put = dict(repair.put)
    for old, new in repair.renamed.items():
        if old in own:
            edits.append((*own[old].span, _flag(config, new, own[old].value)))
    edits += [(*own[name].span, "") for name in repair.removed if name in own]
    put |= _packed(config, repair, own)
    added = []
    for name, value in put.items():
        told = _flag(config, name, value)
        if name in own:
            edits.append((*own[name].span, told))
            edits += [(*e.span, "") for e in config.earlier if e.name == name]
        else:
            added.append(told)
    text = config.text
    if added:
        end = max((entry.span[1] for entry in (*own.values(), *config.earlier)), default=len(text))
        between = "\n" if config.form is Form.FLAGFILE else " "
        text = text[:end] + "".join(between * bool(text[:end].strip()) + told for told in added) + text[end:]
    for start, end, told in sorted(set(edits), reverse=True):
        text = text[:start] + told + text[end:] if told else _without(text, start, end)
    return text


def _packed(config: Configuration, repair: Repair, own: Mapping[str, Entry]) -> dict[str, Any]:
    """Whole tables, where the repair is about something in them."""
    names = {*repair.put, *repair.removed, *repair.renamed, *repair.renamed.values()}
    tables = {name.split(".")[0] for name in names if "." in name and name not in own}
    if not tables or config.kind is not Kind.VLLM:
        return {}
    inner = Repair(
        put={k: v for k, v in repair.put.items() if "." in k and k not in own},
        removed=tuple(k for k in repair.removed if "." in k and k not in own),
        renamed={k: v for k, v in repair.renamed.items() if k not in own},
    )
    document = _document(config, inner)
    return {name: document[name] for name in tables if name in document}


def _flag(config: Configuration, name: str, value: Any) -> str:
    if config.kind is Kind.XLLM:
        return f"--{name}={_word(value) if config.form is Form.COMMAND else told_value(value)}"
    spelled = name.replace("_", "-") if "." not in name else name
    if isinstance(value, dict | list):
        return f"--{spelled} {shlex.quote(json.dumps(value))}"
    if isinstance(value, bool):
        return f"--{spelled}" if value else f"--no-{spelled}"
    return f"--{spelled} {_word(value)}"


def _word(value: Any) -> str:
    told = told_value(value)
    # A variable is for the shell to put in, as it was before.
    return f'"{told}"' if "$" in told and '"' not in told else shlex.quote(told) if told else "''"


def _without(text: str, start: int, end: int) -> str:
    """The text without a flag; a line that held nothing else goes, and a continuation that leads nowhere."""
    before, after = text[:start], text[end:]
    line = before.rfind("\n") + 1
    rest = re.match(r"[ \t]*(\\?)\r?(\n|$)", after)
    if rest is None or before[line:].strip():
        return before.rstrip(" \t") + after if before[line:].strip() else before + after.lstrip(" \t")
    ended = before[:line].rstrip()
    if rest[1] or not ended.endswith("\\"):
        return before[:line] + after[rest.end() :]
    return ended[:-1].rstrip() + rest[2] + after[rest.end() :]

"""From a file's text to a `Configuration`: JSON, YAML, a flagfile, or a script with a command line in it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from xllm_lab.errors import ConfigError
from xllm_lab.tuning.lint.command_line import flag_entries
from xllm_lab.tuning.lint.configuration import Configuration, Entry, Form, Kind
from xllm_lab.tuning.lint.flag_table import every_name
from xllm_lab.tuning.lint.vllm_table import SECTIONS, vllm_options

ACCEPTED = (
    "accepted: the JSON of xLLM's --config_json_file, a flagfile, a YAML of vLLM, or a text with one command line of "
    "either"
)
_MOST_SETTINGS = 2000
_DEEPEST = 32
# What PyYAML and json raise on texts that are none, beside their own errors: numbers of 5000 digits, `!!bool 7`,
# a hundred thousand brackets.
_UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)


def read_configuration(path: str | Path) -> Configuration:
    """Read a file. ConfigError, with the line, if it is none of what is accepted."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no configuration can be read there ({error}); {ACCEPTED}") from None
    return parse_configuration(text, str(path))


def parse_again(config: Configuration, text: str) -> Configuration:
    """The configuration in another text of the same kind and form, even if nothing in it tells."""
    if config.is_flags:
        entries, _, _ = flag_entries(text, config.path)
        if config.kind is Kind.VLLM:
            return _of_vllm_flags(text, config.path, config.form, entries)
        return _configuration(text, config.path, config.kind, config.form, entries)
    if config.kind is Kind.XLLM:
        return _of_json(text, config.path, config.kind)
    document = json.loads(text) if config.form is Form.JSON else yaml.safe_load(text)
    return _of_yaml(text, config.path, document or {}, form=config.form)


def parse_configuration(text: str, path: str) -> Configuration:
    """The configuration in a text; `path` names it in errors. ConfigError as `read_configuration`."""
    if text.lstrip().startswith("{"):
        return _of_json(text, path)
    document = _yaml(text)
    # A command line with JSON in it is YAML, too: a table with a strange key.
    if isinstance(document, dict) and not any(re.search(r"\s-|^-", str(key)) for key in document):
        return _of_yaml(text, path, document)
    entries, form, kind = flag_entries(text, path)
    if not entries and any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()):
        raise ConfigError(f"{path}: holds no settings; {ACCEPTED}")
    if kind is None:
        kind = _kind(entry.name for entry in entries)
    if kind is Kind.VLLM:
        return _of_vllm_flags(text, path, form, entries)
    return _configuration(text, path, kind, form, entries)


def _of_json(text: str, path: str, known: Kind | None = None) -> Configuration:
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # the outermost object is closed last
        return dict(found)

    try:
        document = json.loads(text, object_pairs_hook=keep)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: {error.msg}; xLLM would log that and start with its defaults "
            f"(xllm@3906f5a91 xllm/core/framework/config/config_utils.cpp:99); {ACCEPTED}"
        ) from None
    except _UNREADABLE as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({type(error).__name__}); {ACCEPTED}") from None
    kind = known or _kind(document)
    if kind is Kind.VLLM:
        return _of_yaml(text, path, document, form=Form.JSON)
    lines = _json_lines(text)
    seen: dict[str, int] = {}
    entries = []
    for name, value in pairs:
        seen[name] = seen.get(name, 0) + 1
        where = lines.get(name, [])
        entries.append(Entry(name, value, where[seen[name] - 1] if len(where) >= seen[name] else 1))
    return _configuration(text, path, kind, Form.JSON, entries, document=document)


def _json_lines(text: str) -> dict[str, list[int]]:
    """Lines on which each key is followed by a colon; strings that look like keys are rare, and cost a wrong line."""
    found: dict[str, list[int]] = {}
    for match in re.finditer(r'"((?:[^"\\]|\\.)*)"\s*:', text):
        try:
            name = json.loads(f'"{match[1]}"')
        except ValueError:
            continue
        found.setdefault(name, []).append(text.count("\n", 0, match.start()) + 1)
    return found


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, *_UNREADABLE):
        return None


def _of_yaml(text: str, path: str, document: Mapping[Any, Any], form: Form = Form.YAML) -> Configuration:
    said = {str(name).replace("-", "_") for name in document}
    if len(said & every_name()) > len(said & vllm_options().keys()):
        raise ConfigError(f"{path}: holds xLLM's flags as YAML, which xLLM does not read; {ACCEPTED}")
    unpacked, packed = _unpacked(document)
    lines, doubled = _yaml_lines(text, path)
    entries = list(_flattened(unpacked, path, lines))
    earlier = tuple(Entry(name, None, line) for name, line in doubled)
    made = _configuration(text, path, Kind.VLLM, form, entries, document=unpacked, packed=packed)
    return Configuration(
        path=path,
        text=text,
        kind=made.kind,
        form=form,
        entries=made.entries,
        earlier=earlier,
        document=unpacked,
        packed=packed,
    )


def _of_vllm_flags(text: str, path: str, form: Form, entries: list[Entry]) -> Configuration:
    """Values as vLLM's parser has them; JSON of a nested table is unpacked, and settings like `--a.b 1` nested."""
    known = vllm_options()
    document: dict[str, Any] = {}
    typed = []
    for entry in entries:
        name, value = entry.name, entry.value
        if name.startswith("no_") and name[3:] in known and value is True:
            name, value = name[3:], False
        typed.append(entry._replace(name=name, value=_typed(value)))
        document[name] = typed[-1].value
    unpacked, packed = _unpacked(document)
    lines = {entry.name: entry.line for entry in typed}
    flat = list(_flattened(unpacked, path, lines))
    spans = {entry.name: entry for entry in typed}
    placed = [e._replace(span=spans[e.name].span, line=spans[e.name].line) if e.name in spans else e for e in flat]
    last = set(map(id, spans.values()))
    made = _configuration(text, path, Kind.VLLM, form, placed, document=unpacked, packed=packed)
    earlier = tuple(entry for entry in typed if id(entry) not in last)
    return Configuration(
        path=path,
        text=text,
        kind=Kind.VLLM,
        form=form,
        entries=made.entries,
        earlier=earlier,
        document=unpacked,
        packed=packed,
    )


def _typed(value: Any) -> Any:
    """What a word of a command line means: a number, a boolean, or itself."""
    if not isinstance(value, str) or value.lstrip().startswith("{"):
        return value
    if re.fullmatch(r"[+-]?\d{1,30}", value):
        return int(value)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.?\d+)([eE][+-]?\d{1,3})?", value):
        return float(value)
    return {"true": True, "false": False}.get(value.lower(), value)


def _configuration(
    text: str,
    path: str,
    kind: Kind,
    form: Form,
    entries: Iterable[Entry],
    *,
    document: Mapping[str, Any] | None = None,
    packed: frozenset[str] = frozenset(),
) -> Configuration:
    last: dict[str, Entry] = {}
    earlier: list[Entry] = []
    for entry in entries:
        if entry.name in last:
            earlier.append(last.pop(entry.name))
        last[entry.name] = entry
    if len(last) > _MOST_SETTINGS:
        raise ConfigError(f"{path}: holds {len(last)} settings; at most {_MOST_SETTINGS} are accepted")
    return Configuration(
        path=path,
        text=text,
        kind=kind,
        form=form,
        entries=last,
        earlier=tuple(earlier),
        document=document or {},
        packed=packed,
    )


def _kind(names: Iterable[str]) -> Kind:
    """Whose names most of them are; xLLM's if that does not tell."""
    xllm, vllm = every_name(), vllm_options()
    said = {str(name).replace("-", "_") for name in names}
    return Kind.VLLM if sum(n in vllm for n in said) > sum(n in xllm for n in said) else Kind.XLLM


def _unpacked(document: Mapping[Any, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """The document with vLLM's names, and with nested tables that were texts of JSON as tables."""
    found: dict[str, Any] = {}
    packed = set()
    for key, told in document.items():
        name, value = str(key).replace("-", "_"), told
        if name in SECTIONS and isinstance(value, str) and "$" not in value:
            with contextlib.suppress(*_UNREADABLE):  # a text that is no JSON is of the wrong type
                value = json.loads(value)
            if isinstance(value, dict):
                packed.add(name)
            else:
                value = told
        found[name] = value
    return found, frozenset(packed)


def _flattened(document: Mapping[str, Any], path: str, lines: Mapping[str, int]) -> Iterator[Entry]:
    """Every setting and every table that holds some, by names joined with dots."""
    num, stack = 0, [("", document, 0)]
    while stack:
        prefix, table, depth = stack.pop()
        if depth > _DEEPEST:
            raise ConfigError(f"{path}: {prefix[:60]}... is nested more than {_DEEPEST} deep, or refers to itself")
        for key, value in table.items():
            name = f"{prefix}{key}"
            num += 1
            if num > _MOST_SETTINGS:
                raise ConfigError(f"{path}: holds more than {_MOST_SETTINGS} settings, the most that are accepted")
            yield Entry(name, value, lines.get(name, lines.get(name.partition(".")[0], 1)))
            if isinstance(value, dict):
                stack.append((f"{name}.", value, depth + 1))


def _yaml_lines(text: str, path: str) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """The line of each name, and names that come again in the same table with their earlier lines."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, *_UNREADABLE):
        return {}, []  # JSON with tabs in it, which is no YAML
    lines: dict[str, int] = {}
    doubled: list[tuple[str, int]] = []
    stack: list[tuple[str, Any, int]] = [("", root, 0)]
    while stack and len(lines) <= _MOST_SETTINGS:
        prefix, node, depth = stack.pop()
        if not isinstance(node, yaml.MappingNode) or depth > _DEEPEST:
            continue
        here: dict[str, int] = {}
        for key, value in node.value:
            name = prefix + str(key.value).replace("-", "_") if not prefix else prefix + str(key.value)
            if name in here:
                doubled.append((name, here[name]))
            here[name] = key.start_mark.line + 1
            stack.append((f"{name}.", value, depth + 1))
        lines |= here
    return lines, doubled

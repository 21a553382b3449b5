"""Flags as a shell or gflags reads them, each with its place in the text, so that a repair can change it there."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import NamedTuple

from xllm_lab.errors import ConfigError
from xllm_lab.tuning.lint.configuration import Entry, Form, Kind
from xllm_lab.tuning.lint.flag_table import every_name, is_bool

_PROGRAMS = {"xllm": Kind.XLLM, "xllm_server": Kind.XLLM, "vllm": Kind.VLLM, "api_server": Kind.VLLM}
# A word of a shell's line, its continuation, or what ends the command.
_WORD = re.compile(
    r"""(?P<gap>(?:[ \t]|\\\r?\n)+)
      | (?P<comment>\#[^\n]*)
      | (?P<end>[\n;|&()]|\d?[<>]+)
      | (?P<word>(?:[^\s'"\\;|&()<>]|\\.|'[^']*'|"(?:[^"\\]|\\.)*"|\$\{[^}]*\})+)
      | (?P<odd>.)""",
    re.X | re.S,
)
_FLAG = re.compile(r"--?([A-Za-z][\w.-]*)(=.*)?", re.S)


class _Word(NamedTuple):
    text: str
    start: int
    end: int


def flag_entries(text: str, path: str) -> tuple[list[Entry], Form, Kind | None]:
    """The flags of the one command in a text, its form, and whose they are where the program says so.

    Raises:
        ConfigError: several commands with flags.
    """
    commands = [words for words in _commands(text) if any(_is_flag(word) for word in words)]
    if all(words[0].text.startswith("-") for words in commands):
        return _entries([word for words in commands for word in words], text, None), Form.FLAGFILE, None
    named = [words for words in commands if _program(words)] or commands
    if len(named) > 1:
        lines = ", ".join(str(text.count("\n", 0, words[0].start) + 1) for words in named)
        raise ConfigError(f"{path}: holds {len(named)} command lines, on lines {lines}; one is accepted")
    kind = _program(named[0]) if named else None
    return _entries(named[0], text, kind) if named else [], Form.COMMAND, kind


def _commands(text: str) -> list[list[_Word]]:
    commands: list[list[_Word]] = [[]]
    is_redirected = False
    for found in _WORD.finditer(text):
        if found.lastgroup == "end":
            is_redirected = found[0][-1] in "<>"
            if not is_redirected:
                commands.append([])
        elif found.lastgroup == "word":
            if not is_redirected:
                commands[-1].append(_Word(_unquoted(found[0]), found.start(), found.end()))
            is_redirected = False
    return [words for words in commands if words]


def _unquoted(word: str) -> str:
    """The word without its quotes; variables stay as they are."""
    return re.sub(
        r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)""", lambda m: next(g for g in m.groups() if g is not None), word
    )


def _program(words: list[_Word]) -> Kind | None:
    """Whose command it is, by the name of the program before the first flag."""
    for word in words:
        if _is_flag(word):
            return None
        for part in (word.text, word.text.rsplit(".", 1)[-1]):
            kind = _PROGRAMS.get(PurePosixPath(part).name)
            if kind is not None:
                return kind
    return None


def _is_flag(word: _Word) -> bool:
    return bool(re.match(r"--?[A-Za-z]", word.text)) and _FLAG.fullmatch(word.text) is not None


def _entries(words: list[_Word], text: str, kind: Kind | None) -> list[Entry]:
    found: list[Entry] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        match = _FLAG.fullmatch(word.text) if _is_flag(word) else None
        if match is None:
            continue
        name, told = match[1].replace("-", "_"), match[2]
        follows = words[position] if position < len(words) and not _is_flag(words[position]) else None
        line = text.count("\n", 0, word.start) + 1
        if told is not None:
            found.append(Entry(name, told[1:], line, (word.start, word.end)))
        elif kind is not Kind.VLLM and is_bool(name):
            # gflags takes the next word for an argument of its own.
            span = (word.start, follows.end if follows else word.end)
            found.append(Entry(name, "true", line, span, follows.text if follows else ""))
        elif kind is not Kind.VLLM and name.startswith("no") and is_bool(name[2:]) and name not in every_name():
            found.append(Entry(name[2:], "false", line, (word.start, word.end)))
        elif follows is not None:
            position += 1
            found.append(Entry(name, follows.text, line, (word.start, follows.end)))
        else:
            found.append(Entry(name, True, line, (word.start, word.end)))
    return found

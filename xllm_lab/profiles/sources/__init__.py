"""Readers of what profilers and servers wrote down, one module per kind.

A source is a module in this package with four names; nothing else lists it:

    NAME                what messages call it
    HOLDS               what its folder or file holds, in a few words, for whoever gave another one
    recognises(path)    whether this is meant for it; lenient, so that a folder with a flaw reaches the reader that can
                        name the flaw
    read(path)          the `Profile`; ProfileError in one line for anything else

Modules whose name starts with an underscore are shared by the sources and are none themselves.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from xllm_lab.profiles.profile import Profile


class Source(Protocol):
    """A module that reads the output of one profiler or server."""

    NAME: str
    HOLDS: str

    def recognises(self, path: Path) -> bool: ...
    def read(self, path: Path) -> Profile: ...


@functools.cache
def sources() -> Mapping[str, Source]:
    """Every source by name, in order of name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    modules: list[Source] = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.NAME: module for module in sorted(modules, key=lambda module: module.NAME)}

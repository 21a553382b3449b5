"""What production reads. One file per target; `--to` takes its module's name."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol

from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError


class Export(Protocol):
    """A configuration for one target.

    Attributes:
        config: the file's content.
        left_out: fields of ours that the target has no word for, with their values.
    """

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def left_out(self) -> dict[str, Any]: ...


def targets() -> list[str]:
    """Names that `export` accepts."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def export(candidate: Candidate, to: str, *, kv_bytes_per_token: int) -> Export:
    """Translate a configuration.

    Args:
        kv_bytes_per_token: of the served model, to turn KV tokens into bytes.

    Raises:
        ConfigError: an unknown target, or a policy that the target cannot express.
    """
    if to not in targets():
        raise ConfigError(f"unknown target {to!r}; accepted: {', '.join(targets())}")
    made: Export = importlib.import_module(f"{__name__}.{to}").export(candidate, kv_bytes_per_token)
    return made

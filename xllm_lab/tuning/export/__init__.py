"""What production reads. One file per target; `--to` takes its module's name."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol

from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError
from xllm_lab.policies.catalog import policy_name


class Export(Protocol):
    """A configuration for one target.

    Attributes:
        config: names and values.
        text: the file that says so.
        left_out: fields of ours that the target has no word for, with their values.
    """

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def text(self) -> str: ...
    @property
    def left_out(self) -> dict[str, Any]: ...


def targets() -> list[str]:
    """Names that `export` accepts."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def suffix(to: str) -> str:
    """Of a file that a known target reads, without the dot; vLLM wants its own."""
    known: str = importlib.import_module(f"{__name__}.{to}").SUFFIX
    return known


def export(candidate: Candidate, to: str, *, kv_bytes_per_token: int, version: str | None = None) -> Export:
    """Translate a configuration. What is written is in the target's own table, and `lint` finds nothing wrong with it.

    Args:
        kv_bytes_per_token: of the served model, to turn KV tokens into bytes.
        version: of the target, where several are known; None is the latest.

    Raises:
        ConfigError: an unknown target or version, a policy that the target cannot express, or a value that it refuses.
    """
    if to not in targets():
        raise ConfigError(f"unknown target {to!r}; accepted: {', '.join(targets())}")
    made: Export = importlib.import_module(f"{__name__}.{to}").export(candidate, kv_bytes_per_token, version)
    if candidate.fleet is not None:  # a target serves one instance
        made.left_out["num_instances"] = candidate.fleet.num_instances
        made.left_out.update((decides, policy_name(policy)) for decides, policy in candidate.fleet.decided())
    return made

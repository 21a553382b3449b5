"""The flagfile that xLLM reads with `--flagfile`: a flag a line. The same flags as in its JSON, for any version."""

from __future__ import annotations

from typing import Any, NamedTuple

from xllm_lab.candidate import Candidate
from xllm_lab.tuning.export.xllm import told_in_flags
from xllm_lab.tuning.lint.finding import told_value
from xllm_lab.tuning.lint.flag_table import LATEST, version_named

SUFFIX = "flags"


class XllmFlagfile(NamedTuple):
    """See `Export`."""

    config: dict[str, Any]
    left_out: dict[str, Any]
    version: str

    @property
    def text(self) -> str:
        lines = (f"--{name}={told_value(value)}" for name, value in sorted(self.config.items()))
        return "\n".join((f"# xLLM {self.version}", *lines)) + "\n"


def export(candidate: Candidate, kv_bytes_per_token: int, version: str | None) -> XllmFlagfile:
    """Flags for a configuration. ConfigError as `xllm.told_in_flags`."""
    name = version_named(version or LATEST).name
    told = told_in_flags(candidate, kv_bytes_per_token, name)
    return XllmFlagfile(told.config, told.left_out, name)

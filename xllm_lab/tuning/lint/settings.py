"""What a configuration amounts to: what it says, the defaults for the rest, and what is known beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from xllm_lab.hardware import Device
from xllm_lab.model_spec import PRECISIONS, ModelSpec, Precision
from xllm_lab.tuning.lint.configuration import Configuration, Kind
from xllm_lab.tuning.lint.flag_table import LATEST, XllmFlag, xllm_flags
from xllm_lab.tuning.lint.vllm_table import VllmOption, vllm_options


class Platform(Enum):
    """What an xLLM was built for, as its `--devices` says."""

    NPU = 0
    MLU = 1
    CUDA = 2
    DCU = 3
    ILU = 4
    MUSA = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the file does not say, as far as somebody told.

    Attributes:
        version: of xLLM.
        platform: of xLLM, where the file names no devices.
        concurrency: requests that are served at once.
        request_tokens: prompt and output of a long request.
        model, device: what is served where; without both nothing is said about memory.
        num_devices: of the instance; None is as many as the file says.
        precision: of weights and KV.
    """

    version: str = LATEST
    platform: Platform = Platform.NPU
    concurrency: int | None = None
    request_tokens: int | None = None
    model: ModelSpec | None = None
    device: Device | None = None
    num_devices: int | None = None
    precision: Precision = PRECISIONS["bf16"]


@dataclass(frozen=True)
class Settings(Mapping[str, Any]):
    """Values in force by name: what the file says where it can be read, else the default. None is neither."""

    config: Configuration
    situation: Situation

    def __getitem__(self, name: str) -> Any:
        value = self._read(name)
        if value is not None:
            return value
        known = self.table.get(name)
        return None if known is None else known.default

    def __iter__(self) -> Any:
        return iter(self.config.entries)

    def __len__(self) -> int:
        return len(self.config.entries)

    @cached_property
    def table(self) -> Mapping[str, XllmFlag] | Mapping[str, VllmOption]:
        """Every name there is."""
        return xllm_flags(self.situation.version) if self.config.kind is Kind.XLLM else vllm_options()

    @cached_property
    def platform(self) -> Platform:
        """Of the devices that the file names, else as told."""
        entry = self.config.entries.get("devices")
        prefix = str(entry.value).split(":")[0].upper() if entry else ""
        return Platform.__members__.get(prefix, self.situation.platform)

    def says(self, name: str) -> bool:
        """Whether the file sets it."""
        return name in self.config.entries

    def is_known(self, name: str) -> bool:
        """Whether its value is: one in the file that nobody can read, such as a shell's variable, is not."""
        return name in self.table and (not self.says(name) or self._read(name) is not None)

    def differs(self, name: str) -> bool:
        """Whether the file sets it to something else than the default."""
        known = self.table.get(name)
        return known is not None and self._read(name) not in (None, known.default)

    def line(self, name: str) -> int | None:
        """Where the file sets it."""
        entry = self.config.entries.get(name)
        return entry.line if entry else None

    def _read(self, name: str) -> Any:
        entry, known = self.config.entries.get(name), self.table.get(name)
        if entry is None or known is None:
            return None
        value = entry.value
        if isinstance(known, XllmFlag) and self.config.is_flags:
            value = None if value is True or "$" in str(value) else known.parsed(str(value))
        if value is None or not known.is_of_type(value) or not known.is_within(value):
            return None
        return value

"""The machine under test: an engine on it, a folder for what is found, and what the parts of the plan share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from xllm_lab import transforms
from xllm_lab.arrivals import with_arrivals
from xllm_lab.demo import DEFAULT_TRACE
from xllm_lab.engine.device import open_device
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.formats import read_trace
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.runs import Run
from xllm_lab.workload import Workload

# Of a model with a longer context, this much is used.
_LONGEST = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is served, where, and how much of it.

    Attributes:
        model, device, dtype, threads: as in `EngineOptions`.
        num_requests: in each replay.
        repeats: of each operator's measurement.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 1
    num_requests: int = 16
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("num_requests", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, at least 1 is accepted")


@dataclass
class MachineUnderTest:
    """What the parts of the plan share.

    Attributes:
        runs: made so far, by name.
    """

    options: Options
    folder: Path
    runs: dict[str, Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine: Engine = self._open(self.options.device, self.options.dtype)

    def run(self, name: str) -> Run:
        """A run made before. RunError: it was not, because serving it failed."""
        if name not in self.runs:
            raise RunError(f"run {name} was not made; made were {', '.join(self.runs) or 'none'}")
        return self.runs[name]

    @cached_property
    def reference(self) -> Engine:
        """The same model on a CPU, in float32, with nothing but PyTorch."""
        return self._open("cpu", "float32", without=("native", "onednn"))

    @property
    def longest(self) -> int:
        """Tokens of the longest context that is tried."""
        return min(_LONGEST, self.engine.model.config.max_position)

    @property
    def block_size(self) -> int:
        """Tokens of a KV block that the device's attention takes."""
        return self.engine.device.kv_block_tokens or 16

    def config(self, **changes: object) -> InstanceConfig:
        """An instance with room for all requests of a replay."""
        per_request = -(-self.longest // self.block_size)
        values: dict[str, object] = {
            "block_size": self.block_size,
            "num_kv_blocks": per_request * 16,
            "max_model_len": self.longest,
            "max_tokens_per_batch": min(512, self.longest),
            "max_seqs_per_batch": 16,
        }
        return InstanceConfig(**{**values, **changes})  # type: ignore[arg-type]

    @cached_property
    def windows(self) -> tuple[Workload, Workload]:
        """Two windows of the demo's trace, cut to what the model holds; the first is learnt from."""
        num = self.options.num_requests
        whole = read_trace(DEFAULT_TRACE)
        if len(whole.requests) < 2 * num:
            raise ConfigError(f"num_requests is {num}, at most {len(whole.requests) // 2} are accepted")
        short = transforms.clip_length(
            whole, max_prompt_tokens=self.longest // 2, max_output_tokens=min(64, self.longest // 4)
        )
        return transforms.part(short, 0, num), transforms.part(short, num, 2 * num)

    def at_once(self, workload: Workload) -> Workload:
        """Its requests, all there at the start."""
        return with_arrivals(workload, [0] * len(workload.requests))

    def _open(self, device: str, dtype: str, *, without: tuple[str, ...] = ()) -> Engine:
        o = self.options
        is_host = open_device(device, threads=o.threads).is_host
        return Engine(
            EngineOptions(
                model=o.model,
                device=device,
                dtype=dtype,
                threads=o.threads,
                without_ops=without,
                timer="cpu" if is_host and o.threads == 1 else "wall",
            )
        )

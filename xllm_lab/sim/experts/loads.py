"""Tokens of each expert, layer by layer and tick by tick: from an engine's counters, or drawn."""

# Shapes: T ticks, L layers with experts, E experts

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from xllm_lab.errors import ConfigError, TraceError
from xllm_lab.workload import stream

Counts = npt.NDArray[np.int64]
_ARRAYS = ("tokens", "num_steps", "tick_us")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertLoads:
    """What a model's experts had to do.

    Attributes:
        tokens: int64, [T, L, E]; a token counts once for each expert that it was sent to.
        num_steps: int64, [T], steps in each tick.
        tick_us: how long each tick lasts.

    Raises:
        TraceError: shapes that do not belong together, or counts below 0.
    """

    tokens: Counts
    num_steps: Counts
    tick_us: int

    def __post_init__(self) -> None:
        shape = self.tokens.shape
        if len(shape) != 3 or self.num_steps.shape != shape[:1] or 0 in shape[1:]:
            raise TraceError(
                f"loads of experts have shape {shape} and steps {self.num_steps.shape}; ticks, layers and experts, "
                "and as many ticks are accepted"
            )
        if self.tick_us < 1:
            raise TraceError(f"tick_us is {self.tick_us}, at least 1 is accepted")
        least = min(self.tokens.min(initial=0), self.num_steps.min(initial=0))
        if least < 0:
            raise TraceError(f"a count in loads of experts is {least}, at least 0 is accepted")
        if idle := np.flatnonzero((self.num_steps == 0) & self.tokens.any(axis=(1, 2))).tolist():
            raise TraceError(f"tick {idle[0]} has tokens and no step; accepted are tokens where there are steps")

    @property
    def num_ticks(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.tokens.shape[2])

    def between(self, first: int, end: int) -> ExpertLoads:
        """Ticks `first` to `end`, half-open."""
        return ExpertLoads(tokens=self.tokens[first:end], num_steps=self.num_steps[first:end], tick_us=self.tick_us)

    def every(self, stride: int) -> ExpertLoads:
        """Each so manieth layer, to stand for all: a layer's popularity tells nothing of the next one's."""
        return ExpertLoads(tokens=self.tokens[:, ::stride], num_steps=self.num_steps, tick_us=self.tick_us)

    def save(self, path: Path) -> None:
        """As arrays of numpy, compressed. Missing folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, tokens=self.tokens, num_steps=self.num_steps, tick_us=np.int64(self.tick_us))


def load(path: Path) -> ExpertLoads:
    """What `ExpertLoads.save` wrote.

    Raises:
        TraceError: no such file, or another one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens, steps, tick = (file[name] for name in _ARRAYS)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise TraceError(f"{path}: {error}; accepted are loads of experts, arrays {', '.join(_ARRAYS)}") from None
    if not all(np.issubdtype(array.dtype, np.integer) for array in (tokens, steps, tick)) or tick.ndim:
        raise TraceError(f"{path}: counts and tick_us are not whole numbers, which are accepted")
    return ExpertLoads(tokens=tokens.astype(np.int64), num_steps=steps.astype(np.int64), tick_us=int(tick))


def recorded(steps: Iterable[tuple[int, npt.ArrayLike]], *, tick_us: int) -> ExpertLoads:
    """Counters of an engine's steps, added up by tick.

    Args:
        steps: when each ended, from 0 on, in order; and tokens of each expert, shape [L, E].

    Raises:
        TraceError: no steps, or steps of other shapes.
    """
    ticks = list[Counts]()
    num_steps = list[int]()
    for end_us, rows_LE in steps:
        tokens_LE = np.asarray(rows_LE, dtype=np.int64)
        if ticks and tokens_LE.shape != ticks[0].shape:
            raise TraceError(f"a step counts experts of shape {tokens_LE.shape}, {ticks[0].shape} is accepted")
        while len(ticks) <= end_us // tick_us:
            ticks.append(np.zeros(tokens_LE.shape, np.int64))
            num_steps.append(0)
        ticks[end_us // tick_us] += tokens_LE
        num_steps[end_us // tick_us] += 1
    if not ticks:
        raise TraceError("no step counted its experts, at least one is accepted")
    return ExpertLoads(tokens=np.stack(ticks), num_steps=np.asarray(num_steps, np.int64), tick_us=tick_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipfLoads:
    """A process: popularity falls with rank as 1 / rank^exponent, ranks drift, and experts burst.

    At any time the popularities are the same; who has which changes. Each expert's standing is a stationary Gaussian
    process (Ornstein and Uhlenbeck's), independent in each layer.

    Attributes:
        exponent: 0 is uniform.
        drift_ticks: after so many ticks standings are correlated by 1/e; None if they stay.
        burst_frac: chance of an expert to begin a burst in a tick.
        burst_factor: how much more popular it then is, for `burst_ticks`.

    Raises:
        ConfigError: a value that is not accepted.
    """

    num_layers: int
    num_experts: int
    experts_per_token: int
    tokens_per_step: int
    steps_per_tick: int
    tick_us: int
    exponent: float = 1.0
    drift_ticks: float | None = None
    burst_frac: float = 0.0
    burst_factor: float = 8.0
    burst_ticks: int = 3

    def __post_init__(self) -> None:
        sizes = ("num_layers", "num_experts", "experts_per_token", "tokens_per_step", "steps_per_tick", "tick_us")
        for name in (*sizes, "burst_ticks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, at least 1 is accepted")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(f"experts_per_token is {self.experts_per_token}, at most {self.num_experts} is accepted")
        if self.drift_ticks is not None and not self.drift_ticks > 0:
            raise ConfigError(f"drift_ticks is {self.drift_ticks}, more than 0 is accepted, or None")
        if not 0 <= self.burst_frac <= 1:
            raise ConfigError(f"burst_frac is {self.burst_frac}, 0 to 1 is accepted")
        if not (0 <= self.exponent < math.inf and 0 < self.burst_factor < math.inf):
            raise ConfigError(
                f"exponent is {self.exponent} and burst_factor {self.burst_factor}; at least 0, and more, are accepted"
            )

    def drawn(self, num_ticks: int, *, seed: int) -> ExpertLoads:
        """So many ticks; the same for the same seed, and the first ones of a longer draw."""
        shape = (self.num_layers, self.num_experts)
        rng = stream(seed, "expert loads")
        by_rank_E = np.arange(1, self.num_experts + 1) ** -self.exponent
        keep = 1.0 if self.drift_ticks is None else math.exp(-1 / self.drift_ticks)
        standing_LE = rng.standard_normal(shape)
        bursting_LE = np.zeros(shape, np.int64)
        num_tokens = self.tokens_per_step * self.experts_per_token * self.steps_per_tick
        tokens_TLE = np.empty((num_ticks, *shape), np.int64)
        for tick in range(num_ticks):
            standing_LE = keep * standing_LE + math.sqrt(1 - keep**2) * rng.standard_normal(shape)
            bursting_LE = np.maximum(bursting_LE - 1, 0)
            bursting_LE[rng.random(shape) < self.burst_frac] = self.burst_ticks
            rank_LE = np.argsort(np.argsort(-standing_LE, axis=1, kind="stable"), axis=1, kind="stable")
            weight_LE = by_rank_E[rank_LE] * np.where(bursting_LE > 0, self.burst_factor, 1.0)
            tokens_TLE[tick] = rng.multinomial(num_tokens, weight_LE / weight_LE.sum(axis=1, keepdims=True))
        steps_T = np.full(num_ticks, self.steps_per_tick, np.int64)
        return ExpertLoads(tokens=tokens_TLE, num_steps=steps_T, tick_us=self.tick_us)

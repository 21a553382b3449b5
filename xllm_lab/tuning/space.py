"""The search space, read from the annotations of `InstanceConfig` and of the chosen policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import optuna

from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import Choice, Knob
from xllm_lab.policies.catalog import (
    knobs,
    make_batch_policy,
    make_shapes_policy,
    policies,
    policy_name,
    values_of,
)
from xllm_lab.policies.shapes import ShapesPolicy

SHAPES = "shapes."  # before the names of the shapes policy's knobs


class Space:
    """All candidates around a default one, whose shapes policy they all have.

    KV memory is what the default has: more blocks than fit are cut, so a larger block means fewer of them.

    Args:
        default: the incumbent; fields without a knob keep its values.
        policy_names: policies to choose from; empty means the default's own.

    Raises:
        ConfigError: an unknown policy, or a default outside its own knobs' ranges.
    """

    def __init__(self, default: Candidate, policy_names: Sequence[str] = ()) -> None:
        self.default = default
        known = policies("batch")
        for name in policy_names:
            if name not in known:
                raise ConfigError(f"unknown batch policy {name!r}; accepted: {', '.join(known)}")
        own = policy_name(default.policy)
        self.policy_names = tuple(dict.fromkeys((own, *policy_names)))
        self._policies = {name: known[name] for name in self.policy_names}
        self.default_params()  # which refuses a default outside the ranges

    def default_params(self) -> dict[str, Any]:
        """The default as a trial's parameters."""
        own = policy_name(self.default.policy)
        params: dict[str, Any] = {"policy": own} if len(self.policy_names) > 1 else {}
        parts = (("", self.default.instance), (f"{own}.", self.default.policy), (SHAPES, self.default.shapes))
        for prefix, part in parts:
            for name, note in knobs(type(part)).items():
                value = getattr(part, name)
                _refuse_outside(prefix + name, value, note)
                params[prefix + name] = value
        return params

    def suggest(self, trial: optuna.Trial) -> Candidate:
        """Draw a candidate. Several policies make a conditional space: only the drawn one's knobs are drawn."""
        name = self.policy_names[0]
        if len(self.policy_names) > 1:
            name = trial.suggest_categorical("policy", self.policy_names)
        drawn = dict(_draw(trial, "", InstanceConfig))
        cls = self._policies[name]
        held = values_of(self.default.policy) if name == policy_name(self.default.policy) else {}
        policy = make_batch_policy(name, {**held, **dict(_draw(trial, f"{name}.", cls))})
        return Candidate(
            instance=self._within_memory(replace(self.default.instance, **drawn)),
            policy=policy,
            shapes=self._draw_shapes(trial),
        )

    def describe(self) -> dict[str, Any]:
        """The space as plain data, for the study's manifest."""
        parts = [
            ("", InstanceConfig),
            *((f"{name}.", cls) for name, cls in self._policies.items()),
            (SHAPES, type(self.default.shapes)),
        ]
        ranges = {
            prefix + name: list(note.values) if isinstance(note, Choice) else [note.low, note.high, note.log]
            for prefix, cls in parts
            for name, note in knobs(cls).items()
        }
        return {"policies": list(self.policy_names), "knobs": ranges, "default": self.default.as_dict()}

    def _draw_shapes(self, trial: optuna.Trial) -> ShapesPolicy:
        own = self.default.shapes
        drawn = dict(_draw(trial, SHAPES, type(own)))
        return make_shapes_policy(policy_name(own), {**values_of(own), **drawn})

    def _within_memory(self, instance: InstanceConfig) -> InstanceConfig:
        most = self.default.instance.num_kv_tokens // instance.block_size
        return replace(instance, num_kv_blocks=min(instance.num_kv_blocks, most))


def _draw(trial: optuna.Trial, prefix: str, cls: type[Any]) -> Iterator[tuple[str, Any]]:
    hints = cls.__annotations__
    for name, note in knobs(cls).items():
        if isinstance(note, Choice):
            yield name, trial.suggest_categorical(prefix + name, note.values)
        elif "int" in str(hints[name]):
            yield name, trial.suggest_int(prefix + name, int(note.low), int(note.high), log=note.log)
        else:
            yield name, trial.suggest_float(prefix + name, note.low, note.high, log=note.log)


def _refuse_outside(name: str, value: Any, note: Knob | Choice) -> None:
    if isinstance(note, Choice):
        if value not in note.values:
            raise ConfigError(f"default {name} is {value!r}, the space accepts {', '.join(map(str, note.values))}")
    elif not note.low <= value <= note.high:
        raise ConfigError(f"default {name} is {value}, the space accepts {note.low:g} to {note.high:g}")

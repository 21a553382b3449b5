"""The search space, read from the annotations of `InstanceConfig` and of the chosen policies, a fleet's too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, get_type_hints

from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.instance_config import KV_LAYOUTS, InstanceConfig
from xllm_lab.policies.api import Around, Choice, Knob
from xllm_lab.policies.catalog import knobs_with_effect, make_policy, policies, policy_class, policy_name, values_of
from xllm_lab.policies.draft import METHODS
from xllm_lab.policies.of_instance import DECISIONS, Policies, not_asked


class Draws(Protocol):
    """Who says what each parameter is: an `optuna.Trial`, or a point of an enumeration."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = ...) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = ...) -> float: ...


class Space:
    """All candidates around a default one.

    KV memory is what the default has: more blocks than fit are cut, so a larger block means fewer of them.

    Args:
        default: the incumbent; fields without a knob keep its values.
        also: further policies to choose from, of any decision of the default; "draft.NAME" where several decisions have
            that name.
        methods: that drafts can be made by; a choice among methods is one among these.
        layouts: of KV, likewise: those that somebody can price.
        num_stores: of KV below the host; knobs that need one are searched where there is one.

    Attributes:
        names: of the policies to choose from, by decision; the default's own comes first.

    Raises:
        ConfigError: an unknown policy, or a default outside its own knobs' ranges.
    """

    def __init__(
        self,
        default: Candidate,
        also: Sequence[str] = (),
        *,
        methods: Sequence[str] = METHODS,
        layouts: Sequence[str] = KV_LAYOUTS,
        num_stores: int = 0,
    ) -> None:
        self.default, self._also, self._methods, self._layouts = default, also, methods, layouts
        self._around: dict[Around, int] = {"stores": num_stores, **_around(default.fleet)}
        known = [decides for decides, _ in default.decided()]
        further = [_found(name, known) for name in also]
        self.names = {
            decides: tuple(dict.fromkeys((policy_name(own), *(name for of, name in further if of == decides))))
            for decides, own in default.decided()
        }
        self.default_params()  # which refuses a default outside the ranges

    def where(
        self,
        *,
        methods: Sequence[str] | None = None,
        layouts: Sequence[str] | None = None,
        num_stores: int | None = None,
    ) -> Space:
        """The same space where only these are known, or are there; ConfigError if the default is another."""
        return type(self)(
            self.default,
            self._also,
            methods=methods or self._methods,
            layouts=layouts or self._layouts,
            num_stores=self._around["stores"] if num_stores is None else num_stores,
        )

    def alternatives(self) -> Iterator[Policies]:
        """The default's policies of an instance, and what they are with each one to choose from in its place."""
        yield self.default.policies
        for decides in DECISIONS:
            for name in self.names[decides][1:]:
                yield replace(self.default.policies, **{decides: make_policy(decides, name)})

    def default_params(self) -> dict[str, Any]:
        """The default as a trial's parameters."""
        params: dict[str, Any] = {}
        parts: list[tuple[str, Any]] = [("", self.default.instance)]
        for decides, own in self.default.decided():
            if len(self.names[decides]) > 1:
                params[_which(decides)] = policy_name(own)
            parts.append((self._prefix(decides, policy_name(own)), own))
        for prefix, part in parts:
            for name, note in self._knobs(type(part)).items():
                value = getattr(part, name)
                _refuse_outside(prefix + name, value, note)
                params[prefix + name] = value
        return params

    def suggest(self, trial: Draws) -> Candidate:
        """Draw a candidate. Several policies make a conditional space: only the drawn one's knobs are drawn."""
        # Policies' names, the instance, policies' knobs: in an order that adding a decision does not change.
        names = {decides: self._draw_name(trial, decides) for decides in self.names}
        instance = replace(self.default.instance, **dict(self._draw(trial, "", InstanceConfig)))
        drawn = not_asked(instance.kv_layout)
        for decides, own in self.default.decided():
            if decides in drawn:
                continue
            name = names[decides]
            values = values_of(own) if name == policy_name(own) else {}
            values |= self._draw(trial, self._prefix(decides, name), policy_class(decides, name))
            drawn[decides] = make_policy(decides, name, values)
        policies = Policies(**{decides: drawn.pop(decides) for decides in DECISIONS})
        fleet = None if self.default.fleet is None else replace(self.default.fleet, **drawn)
        return Candidate(instance=self._within_memory(instance), policies=policies, fleet=fleet)

    def describe(self) -> dict[str, Any]:
        """The space as plain data, for the study's manifest."""
        parts: list[tuple[str, Any]] = [("", InstanceConfig)]
        for decides, names in self.names.items():
            parts += [(self._prefix(decides, name), policy_class(decides, name)) for name in names]
        ranges = {
            prefix + name: list(note.values) if isinstance(note, Choice) else [note.low, note.high, note.log]
            for prefix, cls in parts
            for name, note in self._knobs(cls).items()
        }
        return {
            "policies": {decides: list(names) for decides, names in self.names.items()},
            "knobs": ranges,
            "default": self.default.as_dict(),
        }

    def _draw(self, trial: Draws, prefix: str, cls: type[Any]) -> Iterator[tuple[str, Any]]:
        hints = get_type_hints(cls)
        for name, note in self._knobs(cls).items():
            if isinstance(note, Choice):
                yield name, trial.suggest_categorical(prefix + name, note.values)
            elif "int" in str(hints[name]):
                yield name, trial.suggest_int(prefix + name, int(note.low), int(note.high), log=note.log)
            else:
                yield name, trial.suggest_float(prefix + name, note.low, note.high, log=note.log)

    def _knobs(self, cls: type[Any]) -> dict[str, Knob | Choice]:
        """Those that do something here, less the methods and layouts that nobody has: they would be trials in vain."""
        return {name: self._possible(note) for name, note in knobs_with_effect(cls, self._around).items()}

    def _possible(self, note: Knob | Choice) -> Knob | Choice:
        if not isinstance(note, Choice):
            return note
        for every, here in ((METHODS, self._methods), (KV_LAYOUTS, self._layouts)):
            if set(every) <= set(note.values):
                return Choice(*(v for v in note.values if v not in every or v in here))
        return note

    def _draw_name(self, trial: Draws, decides: str) -> str:
        names = self.names[decides]
        if len(names) == 1:
            return names[0]
        name: str = trial.suggest_categorical(_which(decides), names)
        return name

    def _prefix(self, decides: str, name: str) -> str:
        """Before the names of a policy's knobs: of several to choose from, each has its own."""
        if decides == "batch":
            return f"{name}."
        return f"{decides}." if len(self.names[decides]) == 1 else f"{decides}.{name}."

    def _within_memory(self, instance: InstanceConfig) -> InstanceConfig:
        most = self.default.instance.num_kv_tokens // instance.block_size
        return replace(instance, num_kv_blocks=min(instance.num_kv_blocks, most))


def _which(decides: str) -> str:
    """The parameter that says which policy decides."""
    return "policy" if decides == "batch" else decides


def _around(fleet: FleetConfig | None) -> dict[Around, int]:
    return {"instances": 1} if fleet is None else {"instances": fleet.num_instances, "outages": len(fleet.outages)}


def _found(said: str, decisions: Sequence[str]) -> tuple[str, str]:
    """(decision, name) of a policy by its name, or by "decision.name"; ConfigError unless it is one of these."""
    every = [(decides, name) for decides in decisions for name in policies(decides)]
    found = [(decides, name) for decides, name in every if said in (name, f"{decides}.{name}")]
    if not found:
        known = "; ".join(f"{decides}: {', '.join(policies(decides))}" for decides in decisions)
        raise ConfigError(f"unknown policy {said!r}; accepted: {known}")
    if len(found) > 1:
        raise ConfigError(f"policy {said!r} is ambiguous; accepted: {' or '.join(map('.'.join, found))}")
    return found[0]


def _refuse_outside(name: str, value: Any, note: Knob | Choice) -> None:
    if isinstance(note, Choice):
        if value not in note.values:
            raise ConfigError(f"default {name} is {value!r}, the space accepts {', '.join(map(str, note.values))}")
    elif not note.low <= value <= note.high:
        raise ConfigError(f"default {name} is {value}, the space accepts {note.low:g} to {note.high:g}")

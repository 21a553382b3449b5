"""A configuration by names, as a person gives it: of policies, and of knobs, the instance's and the policies' together.

A knob that one part alone has goes by its name, `max_tokens_per_batch`; `draft.depth` says whose it is, always.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.catalog import configured, fields_of, make_policy, policy_class, policy_name, values_of
from xllm_lab.policies.of_instance import DECISIONS, Policies, refuse_other_decisions

DEFAULT = Candidate(instance=InstanceConfig(), policies=Policies(DecodeFirst()))
INSTANCE = "instance"  # beside the decisions, whose the other knobs are


def changed(own: Candidate, names: Mapping[str, str | None], settings: Mapping[str, Any]) -> Candidate:
    """A configuration, but for what is overridden; another policy starts from its own defaults.

    Args:
        names: of policies, by decision; None, or a decision that is missing, keeps the policy.
        settings: values of knobs.

    Raises:
        ConfigError: an unknown decision, policy or knob, a name that several parts have, or a value that is not
            accepted.
    """
    refuse_other_decisions(names)
    was = {decides: policy_name(policy) for decides, policy in own.policies}
    now = {**was, **{decides: name for decides, name in names.items() if name is not None}}
    given = _by_part(now, settings)
    held = {decides: values_of(policy) if now[decides] == was[decides] else {} for decides, policy in own.policies}
    made = {decides: make_policy(decides, now[decides], {**held[decides], **given[decides]}) for decides in DECISIONS}
    return replace(
        own,
        instance=configured(InstanceConfig, {**values_of(own.instance), **given[INSTANCE]}),
        policies=Policies(**made),
    )


def _by_part(names: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of the instance and of each of the named policies, under the names of their fields."""
    parts = {part: fields_of(policy_class(part, name)) for part, name in names.items()}
    parts = {INSTANCE: fields_of(InstanceConfig), **parts}
    given: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for setting, value in settings.items():
        whose = [(part, knob) for part, knob in _places(parts) if setting in (knob, f"{part}.{knob}")]
        if not whose:
            raise ConfigError(
                f"unknown setting {setting!r} for policies {', '.join(names.values())}; accepted: {_accepted(parts)}"
            )
        if len(whose) > 1:
            accepted = " or ".join(f"{part}.{knob}" for part, knob in whose)
            raise ConfigError(f"setting {setting!r} is ambiguous; accepted: {accepted}")
        part, knob = whose[0]
        if knob in given[part]:
            raise ConfigError(f"setting {part}.{knob} is given twice; accepted: once")
        given[part][knob] = value
    return given


def _places(parts: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    return ((part, knob) for part, knobs in parts.items() for knob in knobs)


def _accepted(parts: Mapping[str, tuple[str, ...]]) -> str:
    """Every knob by the shortest name that says whose it is."""
    every = [knob for _, knob in _places(parts)]
    return ", ".join(knob if every.count(knob) == 1 else f"{part}.{knob}" for part, knob in _places(parts))

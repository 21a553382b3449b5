"""A prompt goes where its prefix is cached, unless too many went there already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Knob, Needs
from xllm_lab.policies.routing import RoutePlan, RouteView, in_turn, num_outstanding


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixAffinity:
    """The longest cached prefix among instances that are not overloaded; then the least loaded, then by turns.

    The bound is that of consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018,
    arXiv:1608.01350): no instance takes a request that would lift it above `max_load_factor` times the mean, this
    request included. One that has less always exists, so somebody can always be chosen.

    Attributes:
        max_load_factor: 1 is strict balance, large is pure affinity.
    """

    decides: ClassVar[str] = "route"

    max_load_factor: Annotated[float, Knob(1.0, 8.0, log=True), Needs("instances", 2)] = 1.5

    def __post_init__(self) -> None:
        if not self.max_load_factor >= 1:
            raise ValueError(f"max_load_factor is {self.max_load_factor}, at least 1 is accepted")

    def decide(self, view: RouteView) -> RoutePlan:
        loads = [(i, num_outstanding(i)) for i in in_turn(view)]
        bound = self.max_load_factor * (1 + sum(load for _, load in loads)) / len(loads)
        able = [(-i.num_matched_tokens, load, i.id) for i, load in loads if load < bound]
        matched, _, instance = min(able, key=lambda a: a[:2])
        return RoutePlan(instance=instance, reason="has its prefix" if matched else "least loaded")

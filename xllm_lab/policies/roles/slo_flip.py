"""An instance changes sides when one promise is broken while the other is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Knob, Needs, refuse_below
from xllm_lab.policies.roles import Heard, Role, RoleInstance, RolesPlan, RolesView, changes, first_split
from xllm_lab.policies.routing import num_outstanding

# One stays on each side.
_CAN_FLIP = Needs("instances", 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class SloFlip:
    """Half of the fleet computes prompts at first; then the side that keeps its promise lends to the one that does not.

    First tokens that came in time, of those that came or are overdue, speak for the prefill side; requests that kept
    their TPOT, of those that ended, for the decode side. An instance goes over when its own side keeps at least
    `high_frac` of its promises and the other less than `low_frac`. So a flip is not taken back before one figure has
    risen and the other fallen through the whole band, and only figures since the last change count. Who has the least
    to do goes. At least one instance that is up stays on each side.

    Of a load that no split can serve, the side that is starved always looks as if it could give: there roles would go
    back and forth for ever, and do so no more often than each `min_return_us`.

    xllm-service's SLO_AWARE (391f593, `instance_mgr.cpp`) flips by predicted times, at each request, and without a
    band. As read its flip to decode does nothing: the instance is entered anew by whether any decode instance exists,
    and lands on the prefill side again. Its flip to prefill waits until a decode instance has nothing left to do. Here
    both ways are open, and what a request has is finished where it is.

    Attributes:
        low_frac, high_frac: of promises kept: under the first a side is in need, from the second on it can give.
        min_dwell_us: roles stay at least so long, all of them.
        min_return_us: and so long, if the next flip is the other way than the last.
        min_requests: a side is judged by at least so many; with less, if nothing is there, it keeps its promise, and
            else nobody knows.
    """

    decides: ClassVar[str] = "roles"

    low_frac: Annotated[float, Knob(0.5, 0.85), _CAN_FLIP] = 0.8
    high_frac: Annotated[float, Knob(0.85, 1.0), _CAN_FLIP] = 0.95
    min_dwell_us: Annotated[int, Knob(1_000_000, 60_000_000, log=True), _CAN_FLIP] = 5_000_000
    min_return_us: Annotated[int, Knob(1_000_000, 600_000_000, log=True), _CAN_FLIP] = 30_000_000
    min_requests: Annotated[int, Knob(1, 64, log=True), _CAN_FLIP] = 8

    def __post_init__(self) -> None:
        refuse_below(0, low_frac=self.low_frac, min_dwell_us=self.min_dwell_us, min_return_us=self.min_return_us)
        refuse_below(1, min_requests=self.min_requests)
        if not self.low_frac <= self.high_frac <= 1:
            raise ValueError(
                f"low_frac is {self.low_frac} and high_frac {self.high_frac}, low_frac <= high_frac <= 1 is accepted"
            )

    def decide(self, view: RolesView) -> RolesPlan:
        if all(i.role == "mixed" for i in view.instances):
            return changes(view, first_split(view, len(view.instances) // 2), "half of the fleet each")
        prefill, decode = (_up(view, role) for role in ("prefill", "decode"))
        prompts, tokens = self._prompts_frac(view.heard, prefill), self._tokens_frac(view.heard, decode)
        if self._lends(decode, tokens, prompts):
            return self._flipped(view, decode, "prefill", "first tokens are late")
        if self._lends(prefill, prompts, tokens):
            return self._flipped(view, prefill, "decode", "tokens are slow")
        return RolesPlan(roles={}, reason="neither side is to give")

    def _lends(self, side: Sequence[RoleInstance], own: float | None, others: float | None) -> bool:
        if len(side) < 2 or own is None or others is None:
            return False
        return own >= self.high_frac and others < self.low_frac

    def _prompts_frac(self, heard: Heard, side: Sequence[RoleInstance]) -> float | None:
        return self._frac(heard.num_in_time, heard.num_first_tokens + heard.num_overdue, side)

    def _tokens_frac(self, heard: Heard, side: Sequence[RoleInstance]) -> float | None:
        return self._frac(heard.num_steady, heard.num_ends, side)

    def _frac(self, num_kept: int, num_all: int, side: Sequence[RoleInstance]) -> float | None:
        if num_all >= self.min_requests:
            return num_kept / num_all
        return None if any(map(num_outstanding, side)) else 1.0

    def _flipped(self, view: RolesView, side: Sequence[RoleInstance], role: Role, reason: str) -> RolesPlan:
        since_us = max(i.since_us for i in view.instances)
        goes_back = role not in {i.role for i in view.instances if i.since_us == since_us}
        if view.now_us - since_us < max(self.min_dwell_us, self.min_return_us if goes_back else 0):
            return RolesPlan(roles={}, reason="roles have just changed")
        idlest = min(side, key=lambda i: (num_outstanding(i), i.id))
        return RolesPlan(roles={idlest.id: role}, reason=reason)


def _up(view: RolesView, role: Role) -> list[RoleInstance]:
    return [i for i in view.instances if i.is_up and i.role == role]

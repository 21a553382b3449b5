"""Rank 0 as a `Mover`: it has every rank prepare a change, hears who is ready, and tells when it begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

from xllm_lab.engine.live_experts import LiveExperts
from xllm_lab.engine.ranks import Ranks
from xllm_lab.rebalancing import Change, ExpertLayout, Move
from xllm_lab.step import StepExperts

_serials = count(1)  # of all runs of this process: what an earlier one reports late is not mistaken for this one's


class ExpertMover:
    """A `Mover` over the ranks of an engine.

    Attributes:
        rows: of the counters of slots, which are the layers with experts.
    """

    def __init__(self, layout: ExpertLayout, live: LiveExperts, ranks: Ranks) -> None:
        self._layout, self._live, self._ranks = layout, live, ranks
        self._serial: int | None = None
        self.rows = list(layout.layers)

    @property
    def layout(self) -> ExpertLayout:
        return self._layout

    @property
    def row_units(self) -> int:
        return 1

    @property
    def next_us(self) -> int | None:
        return None

    def begin(self, slots: Sequence[Sequence[int]]) -> None:
        """A run begins with the experts there, on all ranks."""
        if self._live.slots != tuple(map(tuple, slots)):
            self._ranks.tell({"do": "restore experts", "slots": slots})
            self._live.restore(slots)

    def prepare(self, change: Change, now_us: int) -> None:
        self._serial = next(_serials)
        self._ranks.tell({"do": "prepare experts", "serial": self._serial, "moves": change.moves})
        self._live.prepare(self._serial, change.moves, lambda _: None)

    def ready_us(self, now_us: int) -> int | None:
        """When somebody looks, and all have said so."""
        serial = self._serial
        if serial is None or not self._live.is_ready(serial):
            return None
        return now_us if self._ranks.have_reported(_ready(serial)) else None

    def drop(self, now_us: int) -> None:
        if self._serial is not None:
            self._ranks.tell({"do": "drop experts"})
            self._live.drop()
        self._serial = None

    def activation(self, experts: StepExperts) -> Callable[[], None]:
        """Tell the others that a change begins with the step that they are told of next. Returns what rank 0 does."""
        assert self._serial is not None, "a change begins that nobody prepared"
        serial, self._serial = self._serial, None
        self._ranks.tell({"do": "activate experts", "serial": serial, "slots": experts.slots})
        return partial(self._live.activate, serial, experts.slots)


def _ready(serial: int) -> str:
    return f"experts/{serial}"


def obey(message: dict[str, object], live: LiveExperts, ranks: Ranks) -> None:
    """What another rank does about its experts when rank 0 says so."""
    match message:
        case {"do": "prepare experts", "serial": int(serial), "moves": list(moves)}:
            report = ranks.reporter()
            live.prepare(serial, [Move(*move) for move in moves], lambda number: report(_ready(number)))
        case {"do": "activate experts", "serial": int(serial), "slots": list(slots)}:
            live.activate(serial, slots)
        case {"do": "drop experts"}:
            live.drop()
        case {"do": "restore experts", "slots": list(slots)}:
            live.restore(slots)
        case _:
            raise AssertionError(f"rank 0 says {message['do']!r} of experts")

"""Where envelopes lie: what a store needs of a directory or of somebody's library.

Every method but `prepare` is called on a lane's thread, several at once; any may be slow, none needs a deadline of its
own. Names come in token order. `used_ns` is the time of day at which the first of them is used, each further one counts
as used a microsecond earlier: without the first the others are worth nothing, so they are to be evicted before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from xllm_lab.store.envelope import Bytes


class Shelf(Protocol):
    """A place for named envelopes.

    Attributes:
        described: what it is and where it listens, in a few words.
    """

    described: str

    def prepare(self, memory: Bytes) -> None:
        """This memory will be read and written by the calls below, until the shelf is closed."""

    def has(self, names: Sequence[str], used_ns: int) -> list[bool]:
        """Whether each seems to be there."""

    def read(self, names: Sequence[str], slots: Bytes, used_ns: int) -> list[int | str | None]:
        """How many bytes each has, which are in its slot if they fit; None if absent; else what went wrong.

        The list may end with the first that is not there.
        """

    def write(self, names: Sequence[str], slots: Bytes, used_ns: int) -> list[str | None]:
        """None for what was put, else what went wrong; the list may end there."""

    def forget(self, name: str) -> None:
        """Let a wrong block go, so that a right one can be put."""

    def num_evictions(self) -> int:
        """Blocks this process removed to make room."""

    def close(self) -> None:
        """No call is under way, and none comes."""

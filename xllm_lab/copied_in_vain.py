"""When copies that follow one another keep an instance from ever running."""

from __future__ import annotations

# Blocks copied with no step in between, in times of all that both tiers have. A policy that comes to rest needs no more
# than four: each block once down, up, to the store and from there. Ours need 0.2.
MOST_TIMES_IN_VAIN = 10


class CopiedInVain:
    """What was copied since a step was planned last.

    Once all copies have ended everything is free, and somebody can run; but the policy is asked first, and may take it
    all again, for ever.

    Attributes:
        num_blocks: copied.
        since_us: when the first of them was asked for.
    """

    def __init__(self) -> None:
        self.num_blocks = self.since_us = self._num_rounds = 0
        self._last_of_round = -1

    def stepped(self) -> None:
        """A step is planned, or there is nobody to run."""
        self.num_blocks = self._num_rounds = 0

    def launched(self, num_blocks: int, asked_us: int) -> None:
        if not self.num_blocks:
            self.since_us = asked_us
        self.num_blocks += num_blocks

    def is_for_ever(self, oldest: int, num_copies: int, num_all_blocks: int) -> bool:
        """Whether so much was copied that it will go on. No number proves it.

        Args:
            oldest: number of the oldest copy under way; `num_copies` if there is none.
            num_copies: asked for so far.
            num_all_blocks: what the tiers have.
        """
        if oldest > self._last_of_round:
            self._num_rounds, self._last_of_round = self._num_rounds + 1, num_copies - 1
        # Many rounds, in each of which all that was under way ended: fast copies beside a slow one prove nothing.
        return min(self._num_rounds, self.num_blocks // num_all_blocks) > MOST_TIMES_IN_VAIN

"""How often each short run of tokens occurs in a set of sequences, kept as they grow and go.

The structure is a suffix automaton (Blumer et al., "The smallest automaton recognizing the subwords of a text",
Theoretical Computer Science 40, 1985). A state stands for all substrings that end at the same places, each a suffix of
the next longer one, and so have the same count and the same continuations; its link leads to the state of the longest
suffix that ends at more places. It has at most two states a token, where a tree of all substrings up to 64 tokens has
up to 64, and the suffixes of a context are the states on one walk along links.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

ROOT = 0  # the state of the empty string; it is never counted


class Match(NamedTuple):
    """Suffixes of a context that occur, `shortest` to `longest` tokens long, and are always followed by the same."""

    state: int
    shortest: int
    longest: int


class Continuation(NamedTuple):
    """What followed most often, token by token, and the probability that it does so up to each of its tokens."""

    tokens: list[int]
    probabilities: list[float]


class SubstringCounts:
    """Counts of all substrings of up to `max_tokens` tokens.

    Counts of longer ones are not kept: a text that repeats one token n times would cost n updates for each token.
    """

    __slots__ = ("_counts", "_last", "_links", "_longest", "_max_tokens", "_next", "_shortcuts")

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        # By state: transitions, tokens of its longest string, its link, its count.
        self._next: list[dict[int, int]] = [{}]
        self._longest, self._links, self._counts = [0], [-1], [0]
        # By state whose strings are all too long to count: one further along its links, none between being counted.
        self._shortcuts = [-1]
        self._last = ROOT

    @property
    def num_states(self) -> int:
        """What its memory grows with, those that count 0 included."""
        return len(self._next)

    def begin(self) -> None:
        """What is appended from now on is another sequence."""
        self._last = ROOT

    def append(self, token: int) -> None:
        """Make the sequence one token longer: a few steps, amortised, and at most `max_tokens` counts."""
        last = self._last
        known = self._next[last].get(token)
        if known is not None:  # an earlier sequence went on like this
            self._last = self._ending_at(last, token, known)
        else:
            self._last = self._state(self._longest[last] + 1, {}, link=ROOT, count=0)
            while last >= 0 and token not in self._next[last]:
                self._next[last][token] = self._last
                last = self._links[last]
            if last >= 0:
                self._set_link(self._last, self._ending_at(last, token, self._next[last][token]))
        self._count(self._last, 1)

    def add(self, tokens: Sequence[int]) -> None:
        """A whole sequence."""
        self.begin()
        for token in tokens:
            self.append(token)

    def remove(self, tokens: Sequence[int]) -> None:
        """Take back the counts of a sequence that was added. Its states stay, and count 0 if nobody else has them."""
        state = ROOT
        for token in tokens:
            state = self._next[state][token]
            self._count(state, -1)

    def count(self, tokens: Sequence[int]) -> int:
        """Occurrences of 1 to `max_tokens` tokens."""
        assert 1 <= len(tokens) <= self._max_tokens
        state = ROOT
        for token in tokens:
            found = self._next[state].get(token)
            if found is None:
                return 0
            state = found
        return self._counts[state]

    def matches_at_end(self, longest: int) -> Iterator[Match]:
        """Suffixes of the sequence that is being appended to, of at most `longest` tokens, the longest first."""
        return self._matches(self._counted(self._last), longest)

    def matches(self, context: Sequence[int]) -> Iterator[Match]:
        """Suffixes of a context, the longest first."""
        state = length = 0
        for token in context:
            while state and token not in self._next[state]:
                state = self._links[state]
                length = self._longest[state]
            if token in self._next[state]:
                state = self._next[state][token]
                length += 1
        return self._matches(state, length)

    def continuation(self, state: int, limit: int, least_probability: float) -> Continuation:
        """The most frequent next token, up to `limit` times; of equally frequent ones the smallest id.

        It ends before the first token whose probability, all before it included, is less than `least_probability`.
        """
        tokens: list[int] = []
        probabilities: list[float] = []
        probability, counts = 1.0, self._counts
        while len(tokens) < limit:
            best_token = best_count = best_state = 0
            for token, follower in self._next[state].items():
                count = counts[follower]
                if count > best_count or (count == best_count and token < best_token):
                    best_token, best_count, best_state = token, count, follower
            probability *= best_count / counts[state]
            if best_count == 0 or probability < least_probability:
                break
            tokens.append(best_token)
            probabilities.append(probability)
            state = best_state
        return Continuation(tokens, probabilities)

    def _matches(self, state: int, longest: int) -> Iterator[Match]:
        while state:
            link = self._links[state]
            shortest = self._longest[link] + 1
            if shortest <= longest and self._counts[state]:
                yield Match(state, shortest, min(longest, self._longest[state]))
            state = link

    def _ending_at(self, before: int, token: int, state: int) -> int:
        """The state whose longest string is that of `before` and the token; `state` has it, maybe with longer ones."""
        length = self._longest[before] + 1
        if self._longest[state] == length:
            return state
        # The longer ones do not end where the sequence ends now: they keep the state, and the others get their own.
        split = self._state(length, dict(self._next[state]), self._links[state], self._counts[state])
        self._set_link(state, split)
        while before >= 0 and self._next[before].get(token) == state:
            self._next[before][token] = split
            before = self._links[before]
        return split

    def _state(self, longest: int, transitions: dict[int, int], link: int, count: int) -> int:
        self._next.append(transitions)
        self._longest.append(longest)
        self._links.append(link)
        self._shortcuts.append(link)
        self._counts.append(count)
        return len(self._next) - 1

    def _set_link(self, state: int, link: int) -> None:
        self._links[state] = self._shortcuts[state] = link

    def _count(self, state: int, change: int) -> None:
        """All suffixes of a state's strings occur once more, or less."""
        state = self._counted(state)
        while state:
            self._counts[state] += change
            assert self._counts[state] >= 0, "a sequence was removed that is not there"
            state = self._links[state]

    def _counted(self, state: int) -> int:
        """The first on the walk along links that has a string short enough to be counted; shortens the next walk.

        States are only ever inserted into a walk, and one between two that are too long is too long as well, so that a
        shortcut stays right.
        """
        longest, links, shortcuts = self._longest, self._links, self._shortcuts
        passed = []
        while state and longest[links[state]] >= self._max_tokens:
            passed.append(state)
            state = shortcuts[state]
        for one in passed:
            shortcuts[one] = state
        return state

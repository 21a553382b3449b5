"""JSON lines over a socket: what is said is heard, in order, however it is cut; and nothing else is."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab import wire
from xllm_lab.wire import Channel, GoneError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(said=st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=6))
def test_what_is_said_is_heard(said: list[dict[str, object]]) -> None:
    """Values, order, and the end."""
    here, there = map(Channel, socket.socketpair())
    for message in said:
        here.tell(message)
    assert [there.hear(5.0) for _ in said] == said
    assert there.hear(0) is None
    here.close()
    with pytest.raises(GoneError):
        there.hear(5.0)
    there.close()


@given(cuts=st.lists(st.integers(0, 40), max_size=5))
def test_lines_may_come_in_pieces(cuts: list[int]) -> None:
    """Two messages, cut anywhere."""
    data, (ours, theirs) = b'{"a": 1}\n{"b": [2, "\\n"]}\n', socket.socketpair()
    there, heard = Channel(theirs), []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
        ours.sendall(data[start:end])
        heard += there.heard()
    assert heard == [{"a": 1}, {"b": [2, "\n"]}]
    ours.close()
    there.close()


@pytest.mark.parametrize(
    "said", [b"\n", b"{\n", b"3\n", b"\xff\n", b"cos\nsystem\n(S'true'\ntR.\n", b"[" * 99_999 + b"\n"]
)
def test_what_is_no_json_object_ends_the_conversation(said: bytes) -> None:
    """A pickle too."""
    ours, theirs = socket.socketpair()
    there = Channel(theirs)
    ours.sendall(said)
    with pytest.raises(GoneError, match="no JSON"):
        there.hear(5.0)
    ours.close()
    there.close()


def test_a_line_without_an_end_ends_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's memory is filled."""
    monkeypatch.setattr(wire, "MOST_BYTES", 10)
    ours, theirs = socket.socketpair()
    there = Channel(theirs)
    ours.sendall(b"x" * 11)
    with pytest.raises(GoneError, match="more than 10 bytes"):
        there.hear(5.0)
    ours.close()
    there.close()


def test_what_was_said_before_the_end_is_heard() -> None:
    """A process that died has still said what it said."""
    ours, theirs = socket.socketpair()
    here, there = Channel(ours), Channel(theirs)
    here.tell({"last": "words"})
    here.close()
    assert there.heard() == [{"last": "words"}]
    with pytest.raises(GoneError):
        there.heard()
    there.close()

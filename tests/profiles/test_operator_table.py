"""Operator tables as CSV: what was written is read, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.errors import ProfileError
from xllm_lab.operator_table import (
    OperatorRow,
    OperatorTable,
    Shapes,
    read_operator_table,
    shapes_of,
    shapes_text,
    table,
    write_operator_table,
)

shapes = st.none() | st.lists(st.lists(st.integers(0, 2**31), max_size=4).map(tuple), min_size=1, max_size=4).map(tuple)
words = st.text(st.characters(categories=("L", "N", "P", "Zs")), max_size=12)
times = st.floats(0, 1e9, allow_nan=False)


@st.composite
def rows(draw: st.DrawFn) -> OperatorRow:
    least, most = sorted((draw(times), draw(times)))
    return OperatorRow(
        operator=draw(words),
        core=draw(words),
        device=draw(words),
        shapes=draw(shapes),
        dtypes=draw(words),
        num_calls=draw(st.integers(1, 10**9)),
        total_us=most + draw(times),
        min_us=least,
        max_us=most,
    )


@given(st.lists(rows(), max_size=8))
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, drawn: list[OperatorRow]) -> None:
    """Every cell, to the last bit."""
    written = table(iter(drawn))
    path = tmp_path_factory.mktemp("t") / "operators.csv"
    write_operator_table(written, path)
    assert read_operator_table(path) == written


@given(shapes)
def test_shapes_are_text_and_back(drawn: Shapes | None) -> None:
    assert shapes_of(shapes_text(drawn)) == drawn


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ('"16,5120;5120,640"', ((16, 5120), (5120, 640))),
        ("[2,4096];[1]", ((2, 4096), (1,))),
        ("1024;;1024", ((1024,), (), (1024,))),
        ("N/A", None),
    ],
)
def test_shapes_as_profilers_write_them(text: str, meant: Shapes | None) -> None:
    assert shapes_of(text) == meant


@given(st.lists(rows(), max_size=8))
def test_putting_shapes_together_keeps_time_and_calls(drawn: list[OperatorRow]) -> None:
    whole = table(iter(drawn))
    assert whole.by_operator().total_us == pytest.approx(whole.total_us, rel=1e-12)
    assert whole.by_operator().num_calls == whole.num_calls


HEADER = "operator,core,device,shapes,dtypes,num_calls,total_us,min_us,max_us"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ":1: header is []; {header} is accepted"),
        ("a,b\n", ":1: header is [['a', 'b']]; {header} is accepted"),
        (f"{HEADER}\nMatMul,,,N/A,,1,2,1,x\n", ":2: row is 'MatMul,,,N/A,,1,2,1,x' (could not convert string"),
        (f"{HEADER}\nMatMul,,,N/A,,1,2\n", ":2: row is 'MatMul,,,N/A,,1,2' (not enough values to unpack"),
        (f"{HEADER}\nMatMul,,,N/A,,0,2,1,1\n", ":2: row has 0 calls of 1 to 1 us, 2 us together; at least 1 call"),
        (f"{HEADER}\nMatMul,,,N/A,,1,2,1,3\n", ":2: row has 1 calls of 1 to 3 us, 2 us together; at least 1 call"),
        (f"{HEADER}\nMatMul,,,N/A,,1,nan,1,3\n", ":2: row has 1 calls of 1 to 3 us, nan us together; at least 1 call"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(ProfileError) as refused:
        read_operator_table(path)
    assert str(refused.value).startswith(f"{path}{said.format(header=HEADER)}")


def test_an_empty_table_is_one() -> None:
    assert OperatorTable().total_us == 0

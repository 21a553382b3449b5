"""Azure's CSV: every fractional digit counts, and every flaw is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.formats.refusals import assert_refused, assert_refuses_what_is_no_text_file
from xllm_lab.formats import azure, read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
TIME = "2023-11-16 18:15:46.6805900"
TOKENS = "an integer from 1 to 2147483647 is accepted"
A_TIME = "a time like 2023-11-16 18:15:46.6805900 is accepted"


def told(path: Path, *rows: str, header: str = HEADER) -> list[tuple[int, int, int, int]]:
    path.write_text("\r\n".join([header, *rows]))
    requests = read_trace(path).requests
    return [(r.id, r.arrival_us, r.prompt.num_tokens, r.output_tokens) for r in requests]


def test_times_start_at_the_first_arrival(tmp_path: Path) -> None:
    rows = f"{TIME},374,44", "2023-11-16 18:15:50.9951690,396,109", "2023-11-17 00:00:00,879,55"
    assert told(tmp_path / "t.csv", *rows) == [(0, 0, 374, 44), (1, 4_314_579, 396, 109), (2, 20_653_319_410, 879, 55)]


def test_rows_may_stand_in_any_order_of_time(tmp_path: Path) -> None:
    """Servers log a request when it ends; ids follow the arrivals, equal times the rows."""
    rows = "2023-11-16 00:00:02,1,1", "2023-11-16 00:00:01,2,2", "2023-11-16 00:00:02,3,3"
    assert told(tmp_path / "t.csv", *rows) == [(0, 0, 2, 2), (1, 1_000_000, 1, 1), (2, 1_000_000, 3, 3)]


def test_offsets_other_columns_and_quotes_are_understood(tmp_path: Path) -> None:
    rows = 'a,7,9,"2024-05-10 00:00:00.5+00:00"', '"b,c",8,10,2024-05-10 02:00:01+02:00'
    header = "Model,GeneratedTokens,ContextTokens,TIMESTAMP"
    assert told(tmp_path / "t.csv", *rows, header=header) == [(0, 0, 9, 7), (1, 500_000, 10, 8)]


@given(st.lists(st.integers(0, 86_400 * 10**7 - 1), min_size=1, max_size=5))
def test_the_seventh_digit_is_rounded_not_dropped(tmp_path_factory: pytest.TempPathFactory, ticks: list[int]) -> None:
    """Seven digits are tenths of a microsecond."""

    def stamp(tick: int) -> str:
        seconds, fraction = divmod(tick, 10**7)
        return f"2023-11-16 {seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{fraction:07},5,5"

    rows = told(tmp_path_factory.mktemp("azure") / "t.csv", *(stamp(tick) for tick in ticks))
    assert [arrival_us for _, arrival_us, _, _ in rows] == [(t - min(ticks) + 5) // 10 for t in sorted(ticks)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (f"{TIME},-5,44", f"ContextTokens is -5; {TOKENS}"),
        (f"{TIME},0,44", f"ContextTokens is 0; {TOKENS}"),
        (f"{TIME},374,NaN", f"GeneratedTokens is 'NaN'; {TOKENS}"),
        (f"{TIME},374,", f"GeneratedTokens is ''; {TOKENS}"),
        (f"{TIME},3.5,44", f"ContextTokens is '3.5'; {TOKENS}"),
        (f"{TIME},many,44", f"ContextTokens is 'many'; {TOKENS}"),
        (f"{TIME},\N{ARABIC-INDIC DIGIT THREE},44", f"ContextTokens is '\N{ARABIC-INDIC DIGIT THREE}'; {TOKENS}"),
        (f"{TIME},{'9' * 18},44", f"ContextTokens is {'9' * 18}; {TOKENS}"),
        ("46.68,374,44", f"TIMESTAMP is '46.68'; {A_TIME}"),
        ("2023-13-16 18:15:46,374,44", f"TIMESTAMP is '2023-13-16 18:15:46'; {A_TIME}"),
        (
            f"{TIME},374",
            f"row is '{TIME},374' of 2 columns; 3 columns (TIMESTAMP, ContextTokens, GeneratedTokens) is accepted",
        ),
        ('"x', "row is '\"x' (unexpected end of data); comma-separated values is accepted"),
    ],
)
def test_a_flaw_is_named(tmp_path: Path, row: str, said: str) -> None:
    assert_refused(azure.read, tmp_path / "t.csv", f"{HEADER}\n{TIME},1,1\n{row}\n", f"3: {said}")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    said = "1: header is 'TIMESTAMP,ContextTokens'; one column GeneratedTokens is accepted"
    assert_refused(read_trace, tmp_path / "t.csv", f"TIMESTAMP,ContextTokens\n{TIME},374\n", said)


def test_a_header_alone_is_no_trace(tmp_path: Path) -> None:
    said = " holds no requests; a trace of at least one request is accepted"
    assert_refused(read_trace, tmp_path / "t.csv", HEADER, said)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    assert_refuses_what_is_no_text_file(azure.read, tmp_path)

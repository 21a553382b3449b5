"""How a reader has to refuse: one line that names file, line, field, value and what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from xllm_lab.errors import TraceError
from xllm_lab.workload import Workload

Read = Callable[[Path], Workload]


def assert_refused(read: Read, path: Path, content: str | bytes, said: str) -> None:
    """`read` refuses a file of this content; `said` is the whole message after the file's name."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(TraceError) as refused:
        read(path)
    message = str(refused.value)
    assert message == f"{path}:{said}"
    assert "\n" not in message


def assert_refuses_what_is_no_text_file(read: Read, folder: Path) -> None:
    """Missing, a folder, empty, blank, or not UTF-8: the same words in every format."""
    for path, said in (
        (folder / "absent", "cannot be read (No such file or directory); a readable trace file is accepted"),
        (folder, "is a directory; a trace file is accepted"),
        (Path("/dev/null"), "is not a regular file; a trace file is accepted"),
    ):
        with pytest.raises(TraceError) as refused:
            read(path)
        assert str(refused.value) == f"{path}: {said}"
    empty = " is empty; a trace of at least one request is accepted"
    assert_refused(read, folder / "empty", "", empty)
    assert_refused(read, folder / "blank", "\n \r\n", empty)
    latin = "one line\nna\xefve".encode("latin-1")
    assert_refused(read, folder / "latin", latin, "2: byte is 0xef; UTF-8 text is accepted")

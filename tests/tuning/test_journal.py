"""The study's book, and what goes wrong with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from xllm_lab.errors import RunError
from xllm_lab.tuning.journal import open_study, told_of


def interrupted(function: Callable[..., None]) -> Callable[..., None]:
    """As if ctrl-C came right behind its first call."""
    calls = []

    def called(*args: str) -> None:
        calls.append(args)
        function(*args)
        if len(calls) == 1:
            raise KeyboardInterrupt

    return called


@pytest.mark.parametrize("call", ["rename", "unlink"])
def test_an_interruption_while_the_lock_is_given_back_is_one(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna then fails over its own lock, which is not there any more."""
    study = open_study(tmp_path, None, "s")
    monkeypatch.setattr(os, call, interrupted(getattr(os, call)))
    with pytest.raises(KeyboardInterrupt), told_of(tmp_path, None):
        study.tell(study.ask(), 1.0)


def test_a_book_that_cannot_be_written_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot be written: No such file or directory"), told_of(tmp_path, None):
        (tmp_path / "gone" / "book").write_text("")


def test_what_is_neither_goes_on_up(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="else"), told_of(tmp_path, None):
        raise RuntimeError("something else")


def test_a_study_is_found_again(tmp_path: Path) -> None:
    study = open_study(tmp_path, None, "s")
    study.tell(study.ask(), 1.0)
    assert isinstance(study, optuna.Study)
    assert [t.value for t in open_study(tmp_path, None, "s").trials] == [1.0]

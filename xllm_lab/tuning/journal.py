"""The study's book: Optuna's journal file or a database, whole and with one writer, whatever killed the last one."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from sqlalchemy.exc import SQLAlchemyError

from xllm_lab.errors import ConfigError, RunError

JOURNAL = "trials.journal"
STUDY_NAME = "xllm-lab"


@contextmanager
def sole_writer(folder: Path, *, has_journal: bool) -> Iterator[None]:
    """Makes the study this process's alone, and its journal whole: a coordinator may have died while it wrote.

    The lock is the kernel's, so it dies with its owner. Optuna's own, a file, outlives a killed one by 30 seconds.
    """
    journal = folder / JOURNAL
    with (journal if has_journal else folder / "coordinator.lock").open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: is being searched by another process; accepted: one at a time") from None
        if has_journal:
            Path(f"{journal}.lock").unlink(missing_ok=True)
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)  # a torn last line would swallow the next one
        yield


@contextmanager
def told_of(out: Path, storage: str | None) -> Iterator[None]:
    """What goes wrong with the book, as one line. An interruption is none, wherever in the book it came.

    Optuna's lock that is interrupted while it is given back fails over its own file.
    """
    where = out if storage is None else without_password(storage)
    try:
        yield
    except (OSError, RuntimeError) as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from None
        if isinstance(error, RuntimeError):
            raise
        raise RunError(f"{where}: cannot be written: {error.strerror or error}") from None
    except SQLAlchemyError as error:
        raise RunError(f"{where}: cannot be written: {' '.join(str(error).split())[:300]}") from None


def was_interrupted(error: BaseException) -> bool:
    """Whether it happened while an interruption was on its way up."""
    before = error.__context__
    return before is not None and (isinstance(before, KeyboardInterrupt) or was_interrupted(before))


def open_study(
    folder: Path, storage: str | None, name: str, *, directions: tuple[str, ...] = ("maximize",)
) -> optuna.Study:
    """The study, new or as it was left.

    Args:
        storage: a database's URL as Optuna takes it; None is the journal in the folder.

    Raises:
        ConfigError: the database cannot be opened.
        RunError: the journal holds no study of ours.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    where = str(folder / JOURNAL) if storage is None else without_password(storage)
    try:
        opened: BaseStorage = (
            JournalStorage(JournalFileBackend(str(folder / JOURNAL))) if storage is None else RDBStorage(storage)
        )
        return optuna.create_study(
            study_name=name,
            storage=opened,
            directions=[StudyDirection[name.upper()] for name in directions],
            load_if_exists=True,
            sampler=None,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{where}: cannot be read: {error!r}; accepted: the trials of an unfinished study") from None
    except ImportError as error:
        raise ConfigError(f"{where}: {error}; accepted: with the database's driver installed") from None
    except OSError:
        raise
    except Exception as error:
        if storage is None:
            raise
        told = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{where}: cannot be opened: {told}; accepted: a database's URL, as Optuna takes it"
        ) from None


def without_password(url: str) -> str:
    """A database's URL, for people."""
    head, at, tail = url.rpartition("@")
    scheme, colon, rest = head.partition("://")
    return f"{scheme}{colon}{rest.partition(':')[0]}{at}{tail}" if at else url

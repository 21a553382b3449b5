"""The study's book: Optuna's journal file, whole and with one writer, whatever killed the last one."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from xllm_lab.errors import RunError
from xllm_lab.tuning.space import Space

STUDY_NAME = "xllm-lab"
# With more startup trials TPE learns what the workload is like; fewer are wasted where knobs do nothing.
NUM_STARTUP_TRIALS = 16
_AGAIN = "in place of"


@contextmanager
def sole_writer(journal: Path) -> Iterator[None]:
    """Makes the journal writable by this process alone, and whole: a coordinator may have died while it wrote.

    The lock is the kernel's, so it dies with its owner. Optuna's own, a file, outlives a killed one by 30 seconds.
    """
    with journal.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{journal.parent}: is being searched by another process; accepted: one at a time") from None
        Path(f"{journal}.lock").unlink(missing_ok=True)
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)  # a torn last line would swallow the next one
        yield


def open_journal(journal: Path, seed: int, space: Space) -> optuna.Study:
    """The study in a journal file, new or resumed, with its default and whatever was lost queued, and its sampler.

    Raises:
        RunError: the file holds no study of ours.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(study_name=STUDY_NAME, storage=storage, direction="maximize", load_if_exists=True)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{journal}: cannot be read: {error!r}; accepted: the trials of an unfinished study") from None
    _ask_again(study)
    if not study.trials:
        study.enqueue_trial(space.default_params())
    study.sampler = optuna.samplers.TPESampler(
        seed=seed + len(study.trials),
        n_startup_trials=NUM_STARTUP_TRIALS,
        # Optuna 5's defaults (multivariate, constant liar) stay near the first feasible point of tight constraints.
        multivariate=False,
        constant_liar=False,
    )
    return study


def _ask_again(study: optuna.Study) -> None:
    """Queue what a killed coordinator left running, once each, whichever line of this it is killed at itself."""
    for stale in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(stale.number, state=TrialState.FAIL)
    asked_again = {t.user_attrs.get(_AGAIN) for t in study.get_trials(deepcopy=False)}
    for lost in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
        if lost.number not in asked_again:
            # Of the default, which was queued too, not all parameters may have been drawn yet.
            params = {**lost.system_attrs.get("fixed_params", {}), **lost.params}
            study.enqueue_trial(params, user_attrs={_AGAIN: lost.number})

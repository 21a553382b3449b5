"""A program that searches, kills what it searches with at drawn moments, and resumes. `test_kills.py` runs it.

It forks, so that nothing is imported twice.

    python -m tests.tuning.killing WHAT FOLDER [STORAGE]
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.tuning.searches import search
from xllm_lab.errors import RunError
from xllm_lab.tuning.workers import Processes

NUM_TRIALS, NUM_KILLS = 200, 10
RESUMABLE = 3


def study(out: Path, workers: str | None = None, storage: str | None = None) -> None:
    """The whole of it, or what is left. The folder's name says who draws."""
    pool, drawn = Processes(2, start="fork"), out.name.partition("-")[0]
    try:
        search(out, num_trials=num_trials(out), num_workers=2, workers=workers or pool, storage=storage, sampler=drawn)
    finally:
        pool.close()


def num_trials(out: Path) -> int:
    """Fewer where the folder says so: databases are slow, and their book is the same."""
    return int(out.name.partition("-")[2] or NUM_TRIALS)


def evaluated(out: Path) -> int:
    """Reports that are kept."""
    return sum(1 for _ in (out.parent / "evaluations").glob("*/[0-9a-f]*.json"))


def moments(out: Path, seed: int) -> list[float]:
    """Numbers of evaluations at which somebody dies, ascending."""
    return sorted(random.Random(seed).uniform(0, 0.9 * num_trials(out)) for _ in range(NUM_KILLS))


def forked(work: Callable[[], None]) -> int:
    """In a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except RunError as error:
        print(error, file=sys.stderr, flush=True)  # noqa: T201
        os._exit(RESUMABLE)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)
    os._exit(0)


def wait_until(out: Path, moment: float, child: int) -> int | None:
    """Until so much was evaluated, and a little: the exit status if the child ended before."""
    while evaluated(out) < moment:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    time.sleep(moment % 1 * 0.02)  # anywhere between one evaluation and the next
    return None


def ends_well(child: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"the study ended with {code}"


def nobody(out: Path, storage: str | None) -> None:
    study(out, None, storage)


def kill_coordinators(out: Path, storage: str | None) -> None:
    for moment in moments(out, 1):
        child = forked(partial(study, out, None, storage))
        assert wait_until(out, moment, child) is None, "it was to be killed, and ended"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    ends_well(forked(partial(study, out, None, storage)))


def kill_workers(out: Path, storage: str | None) -> None:
    child = forked(partial(study, out, None, storage))
    for moment in moments(out, 2):
        assert wait_until(out, moment, child) is None, "nobody is to be killed any more"
        kill_one(Path(f"/proc/{child}/task/{child}/children").read_text(encoding="ascii").split())
    ends_well(child)


def kill_ray_workers(out: Path, storage: str | None) -> None:
    child = forked(partial(study, out, "ray", storage))
    for moment in moments(out, 3):
        assert wait_until(out, moment, child) is None, "nobody is to be killed any more"
        kill_one(ray_workers())
    ends_well(child)


def ray_workers() -> list[str]:
    """Of Ray's processes that descend from this one, its workers; without its agents, a whole node is gone."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith((b"ray::_in_worker", b"ray::IDLE")) and descends(path.parent.name):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def descends(pid: str) -> bool:
    """From this process."""
    while pid not in ("0", "1"):
        if int(pid) == os.getpid():
            return True
        pid = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1]
    return False


def kill_one(pids: list[str]) -> None:
    for pid in sorted(pids, key=int)[:1]:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue


def fill_disks(out: Path, storage: str | None) -> None:
    """No file may grow beyond what the study's own reaches at the moment: what a full disk does to who writes most."""
    whole = out.parent.with_name(f"undisturbed-{out.name}") / out.name / "trials.journal"
    largest = whole.stat().st_size
    for moment in moments(out, 4):
        limit = max(20_000, int(largest * moment / NUM_TRIALS))

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            study(out, None, storage)

        child = forked(limited)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == RESUMABLE, f"a full disk ended the study with {code}"
    ends_well(forked(partial(study, out, None, storage)))


KILLERS: dict[str, Any] = {
    "nobody": nobody,
    "coordinator": kill_coordinators,
    "worker": kill_workers,
    "ray worker": kill_ray_workers,
    "disk": fill_disks,
}

if __name__ == "__main__":
    KILLERS[sys.argv[1]](Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)

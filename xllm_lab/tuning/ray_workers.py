"""Workers on many machines, by Ray: an extra. Token authentication stays as Ray has it, on unless somebody says so.

A worker may be on a machine that has not the inputs, so their contents travel once each through Ray's object store; a
worker keeps them in a folder of its own, under their hash.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xllm_lab.errors import ConfigError
from xllm_lab.tuning.workers import MOST_DEATHS, Executor, Function, Job, Report, died


@contextmanager
def ray_workers(num_workers: int) -> Iterator[Executor]:
    """Of the cluster that RAY_ADDRESS names, else of one that is started here and stopped at the end.

    Raises:
        ConfigError: Ray is not installed, the cluster cannot be joined, or its token authentication is turned off.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError('executor "ray" is not installed; accepted: pip install "xllm-lab[ray]"') from None
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        raise ConfigError(f"RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']!r}; accepted: token, or unset")
    is_ours = not ray.is_initialized()
    if is_ours:
        address = os.environ.get("RAY_ADDRESS")
        known: dict[str, Any] = {} if address else {"num_cpus": num_workers, "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, **known)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"Ray does not start: {' '.join(str(error).split())[:300]}") from None
    try:
        yield RayWorkers(ray)
    finally:
        if is_ours:
            ray.shutdown()


class RayWorkers:
    """See `Executor`; a task whose worker dies is given to another by Ray itself."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._sent: dict[str, Any] = {}
        self._task = ray.remote(num_cpus=1, max_retries=MOST_DEATHS - 1, retry_exceptions=False)(_in_worker)

    def run(self, function: Function, jobs: Sequence[Job]) -> list[Report]:
        running = [
            self._task.remote(function, one["spec"], list(one["inputs"]), *map(self._content, one["inputs"].items()))
            for one in jobs
        ]
        return [self._report(one) for one in running]

    def _content(self, named: tuple[str, str]) -> Any:
        key, path = named
        if key not in self._sent:
            self._sent[key] = self._ray.put(Path(path).read_bytes())
        return self._sent[key]

    def _report(self, running: Any) -> Report:
        lost = (self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.OutOfMemoryError)
        try:
            report: Report = self._ray.get(running)
        except lost:
            return died()
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if error.cause is not None else error from None
        return report


def _in_worker(function: Function, spec: dict[str, Any], keys: Sequence[str], *contents: bytes) -> Report:
    inputs = {key: str(_kept(key, content)) for key, content in zip(keys, contents, strict=True)}
    return function({"spec": spec, "inputs": inputs})


def _kept(key: str, content: bytes) -> Path:
    """Written once on a machine; whoever comes second finds it."""
    assert hashlib.sha256(content).hexdigest() == key, "an input is what its name says"
    folder = Path(tempfile.gettempdir()) / f"xllm-lab-inputs-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    place = folder / key
    if not place.exists() or place.stat().st_size != len(content):
        partial = folder / f".{key}.{os.getpid()}"
        partial.write_bytes(content)
        partial.replace(place)
    return place

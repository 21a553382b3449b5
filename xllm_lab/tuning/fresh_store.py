"""A store with nothing in it when a run begins: what another left would be found, and make the later one better."""

from __future__ import annotations

from xllm_lab.errors import ConfigError
from xllm_lab.store.directory import blocks_in
from xllm_lab.store.opening import directory_of


class FreshStore:
    """The engine's store; what is in it is removed, as all of it came from runs that began after this.

    Args:
        spec: as engine options have it.

    Raises:
        ConfigError: it is no directory, or has blocks already, which may be somebody's.
    """

    def __init__(self, spec: str) -> None:
        self._path = directory_of(spec)
        if self._path is None:
            raise ConfigError(f"store {spec!r} cannot be emptied before each run; accepted: dir:/PATH")
        if blocks_in(self._path):
            raise ConfigError(f"{self._path}: has blocks that a run would find; accepted: a store with none")

    def empty(self) -> None:
        """Before a run."""
        assert self._path is not None, "it is a directory"
        for block in blocks_in(self._path):
            block.unlink(missing_ok=True)  # a process that makes room may be faster

"""Engines and fleets that a verb is given, or opens and closes itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError

if TYPE_CHECKING:
    from xllm_lab.engine.cluster.fleet import EngineFleet
    from xllm_lab.engine.engine import Engine, EngineOptions


@contextlib.contextmanager
def opened_engine(
    engine: Engine | EngineOptions | EngineFleet | None, candidate: Candidate | None = None
) -> Iterator[Engine]:
    """An engine, closed in the end if it was opened here: for that candidate."""
    from xllm_lab.engine.cluster.fleet import EngineFleet
    from xllm_lab.engine.engine import Engine

    if isinstance(engine, EngineFleet):
        raise ConfigError("an open fleet and no fleet to serve as; accepted: with `fleet`")
    if isinstance(engine, Engine):
        yield engine
        return
    with Engine(engine if engine is None or candidate is None else engine.serving(candidate.policies)) as opened:
        yield opened


@contextlib.contextmanager
def opened_fleet(
    engine: Engine | EngineOptions | EngineFleet | None, num_instances: int, *, registry: str, listen: str
) -> Iterator[EngineFleet]:
    """A fleet, which says where it listens and is closed in the end if it was opened here."""
    from xllm_lab.engine.cluster.fleet import EngineFleet
    from xllm_lab.engine.engine import Engine, EngineOptions

    if isinstance(engine, Engine):
        raise ConfigError("a fleet on an engine that is open already; accepted: engine options, or an open fleet")
    if isinstance(engine, EngineFleet):
        yield engine
        return
    with EngineFleet(engine or EngineOptions(), num_instances, registry=registry, host=listen) as opened:
        opened.tell_where()
        yield opened

"""An engine process of a fleet: it loads its model, enters the registry, and serves what the router sends."""

from __future__ import annotations

import hmac
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

from xllm_lab.copy_time import CopyTime, CopyWeights
from xllm_lab.draft_time import DraftTime, Weights
from xllm_lab.engine.cluster.paces import LockstepPace, Pace, WallPace
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.rank_place import Place
from xllm_lab.engine.rank_processes import LOST_STATUS
from xllm_lab.engine.ranks import join_at
from xllm_lab.errors import RankError, XllmLabError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import configured
from xllm_lab.policies.of_instance import policies_from
from xllm_lab.policies.routing import InstanceId
from xllm_lab.progress import tell
from xllm_lab.registry import Entry, enter
from xllm_lab.scheduler_of import scheduler_of
from xllm_lab.step_time import StepTime
from xllm_lab.wire import Channel, GoneError, address_of, listen

# The environment variable that says who a process is in its fleet.
PLACE = "XLLM_LAB_FLEET_PLACE"
_MEET_S = 600.0  # the others load their models meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberPlace:
    """Who an engine process is in its fleet.

    Attributes:
        registry: `Registry.url`.
        host: on which it listens.
        secret: whoever speaks to it has to know it.
        options: fields of `EngineOptions`.
        rank: fields of `Place`, among instances that share experts; None: this one shares nothing.
    """

    instance: int
    incarnation: str
    registry: str
    host: str
    secret: str
    options: dict[str, Any]
    rank: dict[str, Any] | None = None


def serve_fleet(place: MemberPlace) -> None:
    """Serve a router to its end.

    Raises:
        GoneError: the router is gone.
        UserError: the model cannot be loaded, or the registry does not answer.
        RankError: an instance that shares experts with this one is gone.
    """
    options = EngineOptions(**place.options)
    ranks = None if place.rank is None else join_at(Place(**place.rank), options.rank_timeout_s)
    with Engine(options, ranks=ranks) as engine:
        with listen(place.host) as listening:
            entry = Entry(
                instance=InstanceId(place.instance),
                incarnation=place.incarnation,
                address=address_of(listening),
                config={"model": engine.model.name, "device": engine.device.description},
            )
            lease = enter(place.registry, entry)
            channel = _router(listening, place.secret)
        try:
            _obey(engine, channel, place)
        finally:
            lease.close()
            channel.close()


def _router(listening: socket.socket, secret: str) -> Channel:
    """Whoever connects and knows the secret; all others are hung up on."""
    listening.settimeout(_MEET_S)
    while True:
        try:
            channel = Channel(listening.accept()[0])
        except TimeoutError:
            raise GoneError("no router came") from None
        try:
            hello = channel.hear(10.0)
            if hello is not None and hmac.compare_digest(str(hello.get("secret")), secret):
                return channel
        except GoneError:
            pass
        channel.close()


def _obey(engine: Engine, channel: Channel, place: MemberPlace) -> None:
    channel.tell({"incarnation": place.incarnation, "model": engine.describe(), "drafts": engine.describe_drafts()})
    while (message := channel.hear()) is not None and message["do"] != "end":
        try:
            graphs = _serve(engine, channel, message, place.instance)
        except XllmLabError as error:
            channel.tell({"error": type(error).__name__, "says": str(error)})
            raise
        channel.tell({"served": True, "graphs": graphs, "store": engine.describe_store()})


def _serve(engine: Engine, channel: Channel, message: dict[str, Any], instance: int) -> dict[str, Any] | None:
    config, policies = configured(InstanceConfig, message["instance"]), policies_from(message["policies"])
    engine.refuse(config, policies)
    step_time = None if message["step_time"] is None else StepTime(tuple(message["step_time"]))
    draft_time = DraftTime({method: Weights(*weights) for method, weights in message["draft_time"].items()})
    pace = _pace(engine, channel, message)
    scheduler = scheduler_of(
        *(config, policies, pace.reporter),
        proposer=engine.proposer(policies, config),
        copier=engine.copies(policies.cache, config),
        step_time=step_time,
        draft_time=draft_time,
        copy_time=CopyTime({kind: CopyWeights(*weights) for kind, weights in message["copy_time"].items()}),
        instance=instance,
    )
    pace.scheduler = scheduler
    return engine.serve_on(scheduler, pace, pace.prompt_ids, seat=pace)


def _pace(engine: Engine, channel: Channel, message: dict[str, Any]) -> Pace:
    others = {
        "vocab_size": engine.model.config.vocab_size,
        "seed": message["seed"],
        "tells_index": message["tells_index"],
    }
    if engine.options.clock == "wall":
        return WallPace(channel, heartbeat_us=message["heartbeat_us"], **others)
    return LockstepPace(channel, start_us=message["start_us"], timer=engine.options.timer, **others)


def _main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the router, which ends its engines
    place = MemberPlace(**json.loads(os.environ[PLACE]))
    try:
        serve_fleet(place)
    except RankError as error:
        tell(str(error))
        return LOST_STATUS
    except (XllmLabError, GoneError) as error:
        tell(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main())

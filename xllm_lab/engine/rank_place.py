"""Who a process is among the ranks of a tensor-parallel engine, as torchrun's variables say it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from xllm_lab.errors import ConfigError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A process among its ranks; `local_rank` is the number of its device on its machine."""

    rank: int
    size: int
    local_rank: int
    master_addr: str
    master_port: int

    def environment(self) -> dict[str, str]:
        """As torchrun would say it."""
        values = (self.rank, self.size, self.local_rank, self.master_addr, self.master_port)
        return {name: str(value) for name, value in zip(_VARIABLES, values, strict=True)}


def place_in_environment(environment: Mapping[str, str] = os.environ) -> Place | None:
    """What torchrun's variables say; None if there are none, or one rank.

    Raises:
        ConfigError: some are missing, or are no numbers that go together.
    """
    given = {name: environment[name] for name in _VARIABLES if environment.get(name)}
    if "RANK" not in given or given.get("WORLD_SIZE", "1") == "1":
        return None
    if missing := [name for name in _VARIABLES if name not in given]:
        raise ConfigError(f"RANK is set, {', '.join(missing)} not; accepted: all of torchrun's variables, or none")
    try:
        place = Place(
            rank=int(given["RANK"]),
            size=int(given["WORLD_SIZE"]),
            local_rank=int(given["LOCAL_RANK"]),
            master_addr=given["MASTER_ADDR"],
            master_port=int(given["MASTER_PORT"]),
        )
    except ValueError as error:
        raise ConfigError(f"torchrun's variables: {error}; accepted: whole numbers") from None
    if not 0 <= place.rank < place.size:
        raise ConfigError(f"RANK is {place.rank}, from 0 to below WORLD_SIZE {place.size} is accepted")
    return place


def refuse_other_size(tensor_parallel: int) -> None:
    """Raise ConfigError if torchrun started another number of ranks."""
    place = place_in_environment()
    if place is not None and place.size != tensor_parallel:
        raise ConfigError(f"tensor_parallel is {tensor_parallel}, WORLD_SIZE is {place.size}; accepted: the same")

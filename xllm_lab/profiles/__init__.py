"""What profilers and servers wrote down, read into one shape: operators, collectives, batches, requests.

`read_profile(path)` finds the reader by looking at what is there; `imported` keeps what was read. What readers have in
common:

- a header says the unit of its column, `Duration(us)`, `during_time(ms)`, `start_time(microsecond)`; every time is
  converted by its header, and a unit nobody knows is refused;
- columns that were renamed between releases are accepted under every name they had;
- a row that cannot be used is counted with its reason and its time (`Profile.left_out`), and a row that cannot be
  right (not a number, negative, an impossible unit) is refused with file, line and column;
- a table that was cut off is refused, a line of a log that was is counted.
"""

from __future__ import annotations

from pathlib import Path

from xllm_lab.errors import ProfileError
from xllm_lab.profiles.profile import Profile
from xllm_lab.profiles.sources import sources

__all__ = ["Profile", "is_profile", "read_profile", "sources"]


def read_profile(path: str | Path, *, source: str | None = None) -> Profile:
    """The profile in a folder or file; `source` is found from what lies there unless it is given.

    Raises:
        ProfileError: nothing that a reader knows, or a file or row that cannot be read.
    """
    path = Path(path)
    known = sources()
    accepted = "; ".join(f"{reader.NAME}: {reader.HOLDS}" for reader in known.values())
    if source is not None and source not in known:
        raise ProfileError(f"{path}: source {source!r} is unknown; one of {', '.join(known)} is accepted")
    if not path.exists():
        raise ProfileError(f"{path}: is not there; a profile is accepted ({accepted})")
    if source is not None:
        return known[source].read(path)
    meant = [reader for reader in known.values() if reader.recognises(path)]
    if len(meant) != 1:
        found = " and ".join(reader.NAME for reader in meant) or "none"
        raise ProfileError(f"{path}: looks like {found} of the known profiles ({accepted}); name its source")
    return meant[0].read(path)


def is_profile(path: str | Path) -> bool:
    """Whether some reader takes this for its own."""
    return any(reader.recognises(Path(path)) for reader in sources().values())

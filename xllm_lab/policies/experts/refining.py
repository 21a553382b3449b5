"""Small changes to a placement, as long as one of them lowers the peak."""

# Shapes: E experts, D devices

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
# Smaller gains are of rounding.
_LEAST_GAIN_FRAC = 1e-9


class _Change(NamedTuple):
    """Of devices, whose slot of one expert goes to another; and the peak and the sum of squares that follow."""

    peak: float
    squares: float
    slots: tuple[tuple[int, int, int], ...]


def refined(devices: Sequence[Sequence[int]], loads: Sequence[int], most_changes: int) -> tuple[tuple[int, ...], ...]:
    """The experts of each device after at most so many changes, each the one that lowers the peak most.

    A change swaps an expert of the most loaded device with one of another, or gives a copy's slot to an expert of the
    most loaded device, or there to any other. Where none lowers the peak, one does that leaves it and lowers the sum of
    squares: of equal peaks one is then gone. None loses an expert or has one twice on a device.
    """
    has_DE = np.zeros((len(devices), len(loads)))
    for device, own in enumerate(devices):
        has_DE[device, list(own)] = 1.0
    load_E = np.asarray(loads, dtype=np.float64)
    for _ in range(most_changes):
        loads_D = has_DE @ (load_E / has_DE.sum(axis=0))
        peak, squares = float(loads_D.max()), float(np.square(loads_D).sum())
        best = min((*_swaps(has_DE, load_E, loads_D), *_new_copies(has_DE, load_E, loads_D)), default=None)
        less = 1 - _LEAST_GAIN_FRAC
        if best is None or (best.peak >= peak * less and (best.peak > peak or best.squares >= squares * less)):
            break
        for device, old, new in best.slots:
            has_DE[device, old], has_DE[device, new] = 0.0, 1.0
    return tuple(tuple(np.flatnonzero(has_E).tolist()) for has_E in has_DE)


def _swaps(has_DE: Floats, load_E: Floats, loads_D: Floats) -> Iterator[_Change]:
    """The best swap of the most loaded device with each of the others."""
    share_E = load_E / has_DE.sum(axis=0)
    full, squares = int(np.argmax(loads_D)), float(np.square(loads_D).sum())
    for device in range(len(has_DE)):
        mine = np.flatnonzero((has_DE[full] > 0) & (has_DE[device] == 0))
        theirs = np.flatnonzero((has_DE[device] > 0) & (has_DE[full] == 0))
        if device == full or not len(mine) or not len(theirs):
            continue
        moved = (share_E[mine][:, None] - share_E[theirs]).ravel()
        here, there = loads_D[full] - moved, loads_D[device] + moved
        others = np.delete(loads_D, (full, device)).max(initial=0.0)
        peaks = np.maximum(np.maximum(here, there), others)
        sums = squares - loads_D[full] ** 2 - loads_D[device] ** 2 + here**2 + there**2
        best = int(np.lexsort((sums, peaks))[0])
        i, j = int(mine[best // len(theirs)]), int(theirs[best % len(theirs)])
        yield _Change(float(peaks[best]), float(sums[best]), ((full, i, j), (device, j, i)))


def _new_copies(has_DE: Floats, load_E: Floats, loads_D: Floats) -> Iterator[_Change]:
    """The best expert for each slot whose own has another: of the most loaded device's, or for one of its slots any."""
    copies_E, full = has_DE.sum(axis=0), int(np.argmax(loads_D))
    share_E, fewer_E, more_E = load_E / copies_E, load_E / np.maximum(copies_E - 1, 1), load_E / (copies_E + 1)
    for device, spare in np.argwhere((has_DE > 0) & (copies_E > 1)).tolist():
        wanted = has_DE[device] == 0
        if device != full:
            wanted &= has_DE[full] > 0
        experts = np.flatnonzero(wanted)
        if not len(experts):
            continue
        # Rows: the expert that comes. Its copies lighten, those of whoever goes get heavier.
        after = loads_D + has_DE[:, spare] * (fewer_E[spare] - share_E[spare])
        after = after - has_DE[:, experts].T * (share_E - more_E)[experts, None]
        after[:, device] += more_E[experts] - fewer_E[spare]
        peaks, sums = after.max(axis=1), np.square(after).sum(axis=1)
        best = int(np.lexsort((sums, peaks))[0])
        yield _Change(float(peaks[best]), float(sums[best]), ((device, spare, int(experts[best])),))

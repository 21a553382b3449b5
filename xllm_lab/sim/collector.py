"""Python's cycle collector while a simulation runs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

# Young objects, young collections, middle collections before the next older one is looked at.
_THRESHOLDS = (50_000, 20, 100)


@contextlib.contextmanager
def seldom_collecting() -> Iterator[None]:
    """Collect less often: a simulation makes many objects and hardly a cycle, and looking for them costs a tenth."""
    before = gc.get_threshold()
    gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)

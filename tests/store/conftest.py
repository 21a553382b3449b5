"""Every test that asks for a `place` runs in a directory and, with `-p tests.store.with_mooncake`, in Mooncake."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.places import Place, opened

HAS_MOONCAKE = "tests.store.with_mooncake" in sys.modules
KINDS = ("directory", "mooncake") if HAS_MOONCAKE else ("directory",)
collect_ignore_glob = [] if HAS_MOONCAKE else ["test_mooncake.py", "test_services.py"]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty store's."""
    with opened(request.param, tmp_path / "blocks") as one:
        yield one

"""How a reader of profiles has to refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm_lab.errors import ProfileError
from xllm_lab.profiles import read_profile


def assert_refused(path: Path, said: str) -> None:
    """Reading says exactly this, on one line."""
    with pytest.raises(ProfileError) as refused:
        read_profile(path)
    assert str(refused.value) == said
    assert "\n" not in said

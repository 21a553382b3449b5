"""How a reader of profiles has to refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm_lab.errors import ProfileError
from xllm_lab.profiles import read_profile
from xllm_lab.profiles.steps import steps


def refusal_of(path: Path, source: str) -> str:
    """What the reader of a source, and what makes steps of it, say against a file; "" for nothing."""
    try:
        steps(read_profile(path, source=source), kv_block_tokens=16)
    except ProfileError as error:
        return str(error)
    return ""


def assert_refused(path: Path, said: str) -> None:
    """Reading says exactly this, on one line."""
    with pytest.raises(ProfileError) as refused:
        read_profile(path)
    assert str(refused.value) == said
    assert "\n" not in said

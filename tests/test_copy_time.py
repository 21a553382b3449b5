"""How long copies take: a fit that finds what made the times, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.copy_time import HOST_KINDS, Copied, CopyTime, CopyWeights, fit_copy_time, link_copy_time
from xllm_lab.errors import ConfigError

WEIGHTS = st.builds(CopyWeights, call_us=st.floats(5, 1000), token_us=st.floats(0.5, 50))


@given(offload=WEIGHTS, restore=WEIGHTS)
def test_a_fit_comes_back(offload: CopyWeights, restore: CopyWeights) -> None:
    """From copies of many lengths, each way by itself."""
    made = CopyTime({"offload": offload, "restore": restore})
    copied = [Copied(kind, n, made.copy_us(kind, n)) for kind in HOST_KINDS for n in (16, 64, 256, 1024)]
    found = fit_copy_time(copied)
    assert found
    for kind in HOST_KINDS:
        assert found.weights[kind] == pytest.approx(made.weights[kind], rel=1e-6)


def test_what_was_never_copied_is_not_priced() -> None:
    """And times of one way alone are none that a policy could be told."""
    found = fit_copy_time([Copied("offload", 16, 21.0), Copied("offload", 32, 37.0)])
    assert set(found.weights) == {"offload"}
    assert not found
    assert not CopyTime()


def test_weights_are_never_negative() -> None:
    """Longer copies that took less time are noise."""
    call_us, token_us = fit_copy_time([Copied("restore", 10, 50.0), Copied("restore", 100, 20.0)]).weights["restore"]
    assert call_us > 0
    assert token_us == 0


def test_a_link_has_its_rate_both_ways() -> None:
    """10 GB/s and 1 kB a token are 10 tokens a microsecond."""
    link = link_copy_time(10e9, 1000, latency_us=7.0)
    assert [link.copy_us(kind, 200) for kind in HOST_KINDS] == [27.0, 27.0]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: CopyTime({"sideways": CopyWeights()}), "weights of 'sideways', accepted: offload, restore"),  # type: ignore[dict-item]
        (lambda: CopyTime({"restore": CopyWeights(-1.0, 2.0)}), "2 numbers of at least 0"),
        (lambda: CopyTime({"restore": CopyWeights(float("nan"), 2.0)}), "2 numbers of at least 0"),
        (lambda: CopyTime({"restore": (1.0,)}), "2 numbers of at least 0"),  # type: ignore[dict-item]
        (lambda: link_copy_time(0.0, 100), "bytes_per_s is 0.0, more than 0 is accepted"),
        (lambda: link_copy_time(float("nan"), 100), "bytes_per_s is nan, more than 0 is accepted"),
    ],
)
def test_bad_times_are_refused(make: Callable[[], object], told: str) -> None:
    """With what is accepted."""
    with pytest.raises(ConfigError, match=told):
        make()


def test_what_never_came_is_not_priced() -> None:
    """Misses alone say what a call takes, and nothing of bytes."""
    missed = [Copied("prefetch", 0, us) for us in (300, 400)]
    fitted = fit_copy_time([*missed, Copied("save", 0, 200), Copied("save", 64, 900)])
    assert set(fitted.weights) == {"save"}
    assert fitted.copy_us("save", 64) == pytest.approx(900, rel=0.01)

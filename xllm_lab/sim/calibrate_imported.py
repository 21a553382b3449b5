"""Learn step times from the batches of a profiled server, on a machine that this package never ran on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xllm_lab.errors import ConfigError
from xllm_lab.profiles.profile import LeftOut, Profile
from xllm_lab.profiles.steps import steps
from xllm_lab.sim.calibrate import Calibration, calibrate_on
from xllm_lab.step_samples import StepSample


@dataclass(frozen=True, slots=True)
class ProfiledCalibration:
    """A calibration, and what of the profiles went into it.

    Attributes:
        num_by_basis: steps by what their lengths rest on.
        left_out: batches that could not be used, and rows of the files.
    """

    calibration: Calibration
    num_by_basis: dict[str, int]
    left_out: tuple[LeftOut, ...]


def calibrate_profiles(
    profiles: Sequence[Profile], *, vocab_size: int | None, kv_block_tokens: int | None = None
) -> ProfiledCalibration:
    """Fit step times to the executed batches of profiles of one model on one machine.

    Args:
        vocab_size: of the served model; no profile tells it, and the simulator draws prompts from it.
        kv_block_tokens: tokens of a KV block; see `profiles.steps`.

    Raises:
        ConfigError: a profile without batches, no vocabulary, or too few steps.
    """
    if vocab_size is None or vocab_size < 1:
        raise ConfigError(f"vocab_size is {vocab_size}; that of the profiled model, at least 1, is accepted")
    samples: list[StepSample] = []
    bases: dict[str, int] = {}
    left_out: list[LeftOut] = []
    for profile in profiles:
        if not profile.batches:
            raise ConfigError(f"{profile.path}: has no executed batches; a profile with a batch.csv is accepted")
        found = steps(profile, kv_block_tokens=kv_block_tokens)
        samples += found.samples
        left_out += (*profile.left_out, *found.left_out)
        for basis, num in found.num_by_basis.items():
            bases[basis] = bases.get(basis, 0) + num
    names = tuple(profile.path.name for profile in profiles)
    calibration = calibrate_on(
        samples,
        model={"name": "profiled", "vocab_size": vocab_size},
        hardware={"profiled_by": sorted({profile.source for profile in profiles})},
        sources=names,
    )
    return ProfiledCalibration(calibration, bases, tuple(left_out))

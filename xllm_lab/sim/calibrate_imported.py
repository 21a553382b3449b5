"""Learn step times from the batches of a profiled server, on a machine that this package never ran on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xllm_lab.errors import ConfigError
from xllm_lab.profiles.imported import STEPS, read_import, read_steps
from xllm_lab.sim.calibrate import Calibration, calibrate_on


def calibrate_imported(folders: Sequence[Path], *, vocab_size: int | None) -> Calibration:
    """Fit step times to the executed batches in folders that `import` wrote, of one model on one machine.

    Args:
        vocab_size: of the served model; no profile tells it, and the simulator draws prompts from it.

    Raises:
        ConfigError: a folder without batches, no vocabulary, or too few steps.
        RunError: a folder that cannot be read.
    """
    if vocab_size is None or vocab_size < 1:
        raise ConfigError(f"vocab_size is {vocab_size}; that of the profiled model, at least 1, is accepted")
    sources = set()
    for folder in folders:
        imported = read_import(folder)
        if STEPS not in imported.parts:
            why = imported.missing.get(STEPS, "nothing says why")
            raise ConfigError(f"{folder}: has no {STEPS} ({why}); accepted: an import of executed batches")
        sources.add(imported.source)
    return calibrate_on(
        [sample for folder in folders for sample in read_steps(folder)],
        model={"name": "profiled", "vocab_size": vocab_size},
        hardware={"profiled_by": sorted(sources)},
        sources=tuple(folder.name for folder in folders),
    )

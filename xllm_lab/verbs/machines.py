"""Machines: what is known of their times."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from xllm_lab.errors import ConfigError
from xllm_lab.profiles import is_profile, read_profile
from xllm_lab.profiles.imported import Imported, is_import, read_import, write_import
from xllm_lab.progress import bar, tell
from xllm_lab.runs import Run
from xllm_lab.verbs.given import (
    PathLike,
    run_of,
)

if TYPE_CHECKING:
    from xllm_lab.sim.calibrate import Calibration
    from xllm_lab.sim.validate.measured import MeasuredValidation
    from xllm_lab.sim.validate.published import PublishedValidation


def calibrate(
    runs: Iterable[Run | PathLike],
    *,
    out: PathLike | None = None,
    vocab_size: int | None = None,
) -> Calibration:
    """Fit step times to engine runs, or to folders that `import_profile` wrote, and write them to `out` if given.

    Args:
        vocab_size: of the model of imported profiles.
    """
    from xllm_lab.sim.calibrate import calibrate as fit
    from xllm_lab.sim.calibrate import write_calibration
    from xllm_lab.sim.calibrate_imported import calibrate_imported

    given = list(runs)
    paths = [Path(run) for run in given if not isinstance(run, Run)]
    for path in paths:
        if not is_import(path) and is_profile(path):
            raise ConfigError(f"{path}: is a profile; accepted: engine runs, or folders that `xllm-lab import` wrote")
    imports = [path for path in paths if is_import(path)]
    if imports and len(imports) < len(given):
        raise ConfigError(f"{imports[0]}: is an import and others are runs; accepted: runs alone, or imports alone")
    for path in imports:
        for basis, num in sorted(read_import(path).num_by_basis.items()):
            tell(f"xllm-lab: {path}: {num} steps: {basis}")
    fitted = calibrate_imported(imports, vocab_size=vocab_size) if imports else fit([run_of(run) for run in given])
    if out is not None:
        write_calibration(fitted, Path(out))
    return fitted


def profile_engine(
    *,
    out: PathLike,
    model: str,
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 1,
    timer: str = "wall",
    progress: bool = True,
    **grid: int,
) -> dict[str, dict[int, float]]:
    """Measure the engine's operators on the device at hand, for `simulate` on a machine `--profile`d so.

    Args:
        out: the profile bundle, a new folder.
        grid: fields of `engine.machine_profile.Grid`.
    """
    from xllm_lab.engine.engine import Engine, EngineOptions
    from xllm_lab.engine.machine_profile import Grid, num_shapes, write_machine_profile

    wanted = Grid(**grid)
    engine = Engine(EngineOptions(model=model, device=device, dtype=dtype, threads=threads, timer=timer))
    with bar(num_shapes(wanted), "profile", show=progress) as measured:
        return write_machine_profile(engine, Path(out), wanted, progress=measured.update)


def import_profile(source: str, path: PathLike, *, out: PathLike, kv_block_tokens: int | None = None) -> Imported:
    """Write a new folder of what a profiler recorded, see `profiles.imported`: steps, a trace, operators, collectives.

    Args:
        source: a name of `profiles.sources()`.
        path: the profiler's folder or file.
        kv_block_tokens: tokens of a KV block of the profiled server, for batches that name no lengths.

    Raises:
        ProfileError: an unknown source, or a file or row that cannot be read.
        ConfigError: nothing in it can be used.
        RunError: the folder exists or cannot be written.
    """
    return write_import(read_profile(path, source=source), Path(out), kv_block_tokens=kv_block_tokens)


def validate_npu() -> PublishedValidation:
    """The roofline model beside published measurements on Ascend NPUs, its error as it is."""
    from xllm_lab.sim.validate_npu import validate_npu as validate

    return validate()


def validate_measured(
    folder: PathLike, *, model_config: PathLike | None = None, workload: PathLike | None = None
) -> MeasuredValidation:
    """What vLLM did on a measured machine beside what the simulator says, from the machine's operator profile alone.

    `workload` is what was replayed there, for the tokens of its prompts.
    """
    from xllm_lab.sim.validate.measured import validate_measured as validate

    return validate(
        Path(folder),
        model_config=None if model_config is None else Path(model_config),
        workload_file=None if workload is None else Path(workload),
    )


def validate_mtp() -> PublishedValidation:
    """xLLM's published table of multi-token prediction: three rows fitted, the others predicted by the simulator."""
    from xllm_lab.sim.validate.mtp import validate_mtp as validate

    return validate()

"""Folders that `torch_npu.profiler` writes: `*_ascend_pt/ASCEND_PROFILER_OUTPUT/` with CSV files.

kernel_details.csv     every kernel: type, core, shapes, duration; the operator table and the collectives
op_statistic.csv       sums by operator type: the operator table if kernel_details.csv is absent, else a second opinion
step_trace_time.csv    per step: computing, communication, free
operator_details.csv   framework operators: time on the host

Columns as in torch_npu 2.10 and 2.13; `Block Dim` and other names of older releases are not needed here. Several
folders under the one given, a folder per rank, are read as one: rows of devices of the same number are put together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from xllm_lab.errors import ProfileError
from xllm_lab.operator_table import OperatorRow, OperatorTable, Shapes, shapes_of, table
from xllm_lab.profiles.profile import CollectiveRow, HostOperator, Profile, StepSplit
from xllm_lab.profiles.sources._collectives import collective_of, message_bytes
from xllm_lab.profiles.sources._csv import LATEST_CLOCK_NS, LONGEST_STEP_NS, Column, CsvFile, Row
from xllm_lab.profiles.sources._tally import Calls, Unused

NAME = "ascend-profiler"
HOLDS = "a folder *_ascend_pt of torch_npu.profiler"

_OUTPUT = "ASCEND_PROFILER_OUTPUT"
_KERNELS, _STATISTIC, _STEPS, _HOST = (
    "kernel_details.csv",
    "op_statistic.csv",
    "step_trace_time.csv",
    "operator_details.csv",
)
_FILES = (_KERNELS, _STATISTIC, _STEPS, _HOST)
# A device runs a few streams side by side. Kernels that fill its time more often than this are not in microseconds.
_MOST_STREAMS = 64
# op_statistic.csv rounds its means; beyond this it says something else than its counts and sums.
_ROUNDING_FRAC = 0.01
_ROUNDING_US = 0.01

_Operator = tuple[str, str, str, Shapes | None, str]  # operator, core, device, shapes, dtypes
_Transfer = tuple[str, str, str, int | None]  # collective, device, group, message_bytes


def recognises(path: Path) -> bool:
    """Whether there is an output folder here, or below, or its files."""
    return bool(_outputs(path))


def read(path: Path) -> Profile:
    """The profile in one folder or in those of all ranks; ProfileError names file and line of what cannot be read."""
    found = _Found()
    outputs = _outputs(path)
    if not outputs:
        raise ProfileError(f"{path}: has no {_OUTPUT} with {', '.join(_FILES)}; {HOLDS} is accepted")
    for output in outputs:
        for name, reader in _READERS.items():
            if (output / name).is_file():
                file = CsvFile(output / name)
                reader(file, found)
                found.files.add(name)
                where = file.path.relative_to(path)
                found.units |= {f"{where}: {column}": unit for column, unit in file.units.items()}
    return found.profile(path)


def _outputs(path: Path) -> list[Path]:
    candidates = [path, path / _OUTPUT, *sorted(path.glob(f"*/{_OUTPUT}"))] if path.is_dir() else []
    return [folder for folder in candidates if any((folder / name).is_file() for name in _FILES)]


@dataclass(slots=True)
class _Found:
    """What the files said so far."""

    operators: dict[_Operator, Calls] = field(default_factory=dict)
    transfers: dict[_Transfer, Calls] = field(default_factory=dict)
    carried_out: dict[tuple[str, str], Calls] = field(default_factory=dict)  # second rows, by collective and device
    statistic: dict[tuple[str, str, str], Calls] = field(default_factory=dict)  # by type, core, device
    splits: list[StepSplit] = field(default_factory=list)
    kernel_steps: dict[str, set[str]] = field(default_factory=dict)  # marks by device
    host: dict[str, tuple[Calls, Calls]] = field(default_factory=dict)
    unused: Unused = field(default_factory=Unused)
    files: set[str] = field(default_factory=set)
    units: dict[str, str] = field(default_factory=dict)

    def profile(self, path: Path) -> Profile:
        notes = [f"{name} is not there" for name in _FILES if name not in self.files]
        notes += self._settle_second_rows()
        operators = _table(self.operators)
        if _KERNELS not in self.files:
            operators = _table(
                {(type, core, device, None, ""): c for (type, core, device), c in self.statistic.items()}
            )
        elif self.statistic:
            notes += self._disagreements()
        notes += _hidden_lengths(operators)
        if self.transfers and all(key[3] is None for key in self.transfers):
            notes.append("collectives: message sizes are not recorded; operations of all sizes are put together")
        if any(not split.step for split in self.splits):
            notes.append(f"{_STEPS}: steps were not marked, a row without a step is the whole recording")
        return Profile(
            source=NAME,
            path=path,
            operators=operators,
            collectives=tuple(_collectives(self.transfers)),
            splits=tuple(self.splits),
            num_steps=max(map(len, self._marks().values()), default=0),
            host_operators=tuple(_host_operators(self.host)),
            units=self.units,
            left_out=self.unused.rows(),
            notes=tuple(notes),
        )

    def _marks(self) -> dict[str, set[str]]:
        """The marked steps of each device."""
        marks: dict[str, set[str]] = {}
        for split in self.splits:
            if split.step:
                marks.setdefault(split.device, set()).add(split.step)
        return marks or self.kernel_steps

    def _settle_second_rows(self) -> list[str]:
        """Leave out the kernels of collectives that have an operation's row; the others are all there is of theirs."""
        notes = []
        operations = {(name, device) for name, device, _, _ in self.transfers}
        devices = {device for _, device in operations}
        for (name, device), calls in sorted(self.carried_out.items()):
            if (name, device) in operations or (not name and device in devices):
                reason = "the kernel of a collective that an hcom row counts already"
                self.unused.add_calls(_KERNELS, reason, calls)
            else:
                self.transfers[name or "unknown", device, "", None] = calls
                notes.append(f"{_KERNELS}: {name or 'a collective'} on device {device} has kernels and no hcom row")
        return notes

    def _disagreements(self) -> list[str]:
        """Where the two files differ, each type's time over all devices and cores."""
        sums: dict[str, list[int]] = {}
        for (type, *_), calls in self.statistic.items():
            sums.setdefault(type, [0, 0])[0] += calls.total_ns
        for (type, *_), calls in self.operators.items():
            if type in sums:
                sums[type][1] += calls.total_ns
        differing = [t for t, (said, seen) in sorted(sums.items()) if seen and abs(said - seen) > _ROUNDING_FRAC * seen]
        told = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        return [f"{_STATISTIC}: other times than {_KERNELS} for {told}; the kernels count"] if differing else []


def _read_kernels(file: CsvFile, found: _Found) -> None:
    name, type, duration = file.column("Name"), file.column("Type"), file.time("Duration")
    core, device, step = file.maybe("Accelerator Core"), file.maybe("Device_id", "Device ID"), file.maybe("Step Id")
    start = file.maybe_time("Start Time")
    shapes, dtypes = file.maybe("Input Shapes"), file.maybe("Input Data Types")
    spans: dict[str, _Span] = {}
    for row in file.rows():
        ns, where = row.ns(duration, most=LONGEST_STEP_NS), row.text(device)
        if start is not None:
            spans.setdefault(where, _Span()).add(row.ns(start, most=LATEST_CLOCK_NS), ns)
        if row.text(step):
            found.kernel_steps.setdefault(where, set()).add(row.text(step))
        inputs = _shapes(row, shapes)
        collective = collective_of(row.text(name), row.text(type))
        if collective is None:
            key = (row.text(type) or row.text(name), row.text(core), where, inputs, row.text(dtypes).strip('"'))
            found.operators.setdefault(key, Calls()).add(ns)
        elif collective.is_operation:
            size = message_bytes(inputs, row.text(dtypes).strip('"'))
            found.transfers.setdefault((collective.name, where, collective.group, size), Calls()).add(ns)
        else:
            found.carried_out.setdefault((collective.name, where), Calls()).add(ns)
    for where, span in spans.items():
        span.check(file.path, where)


def _shapes(row: Row, column: Column | None) -> Shapes | None:
    if column is None or not row.text(column):
        # Blank is how a kernel without inputs is written, as well as one whose inputs were not recorded.
        return None
    try:
        return shapes_of(row.text(column))
    except ValueError:
        raise row.refusal(column, "shapes such as 8,5120;5120,3200, or N/A,") from None


@dataclass(slots=True)
class _Span:
    """When a device's kernels ran, and how long all together."""

    first_ns: int | None = None
    last_ns: int = 0
    busy_ns: int = 0

    def add(self, start_ns: int, ns: int) -> None:
        self.first_ns = start_ns if self.first_ns is None else min(self.first_ns, start_ns)
        self.last_ns = max(self.last_ns, start_ns + ns)
        self.busy_ns += ns

    def check(self, path: Path, device: str) -> None:
        assert self.first_ns is not None, "a span is made for a kernel"
        span_ns = self.last_ns - self.first_ns
        if self.busy_ns > _MOST_STREAMS * span_ns:
            raise ProfileError(
                f"{path}: the kernels of device {device or '?'} last {self.busy_ns / 1e3:g} us in a span of "
                f"{span_ns / 1e3:g} us, so a unit is not what the header says; at most {_MOST_STREAMS} kernels at a "
                f"time are accepted"
            )


def _read_statistic(file: CsvFile, found: _Found) -> None:
    type, core, device = file.column("OP Type"), file.maybe("Core Type"), file.maybe("Device_id", "Device ID")
    count = file.column("Count")
    total, least, mean, most = (file.time(f"{which} Time") for which in ("Total", "Min", "Avg", "Max"))
    for row in file.rows():
        num = row.count(count)
        total_ns = row.ns(total, most=LONGEST_STEP_NS * max(num, 1))
        least_ns, mean_ns, most_ns = (row.ns(column, most=LONGEST_STEP_NS) for column in (least, mean, most))
        slack_ns = max(_ROUNDING_FRAC * total_ns, _ROUNDING_US * 1e3 * num)
        if num == 0 or not least_ns <= most_ns or abs(num * mean_ns - total_ns) > slack_ns:
            accepted = "Count times the mean, Count being at least 1 and Min at most Max,"
            raise row.refusal(total, accepted)
        key = (row.text(type), row.text(core), row.text(device))
        if key in found.statistic:
            kept = found.statistic[key]
            num, total_ns = kept.num + num, kept.total_ns + total_ns
            least_ns, most_ns = min(kept.least_ns, least_ns), max(kept.most_ns, most_ns)
        found.statistic[key] = Calls(num, total_ns, least_ns, most_ns)


def _read_steps(file: CsvFile, found: _Found) -> None:
    # The only file of these whose header says no units; its times are microseconds.
    device, step = file.maybe("Device_id", "Device ID"), file.column("Step")
    computing, hidden = file.time("Computing", unit="us"), file.time("Overlapped", unit="us")
    shown = file.time("Communication(Not Overlapped)", unit="us")
    communication, free = file.time("Communication", unit="us"), file.time("Free", unit="us")
    for row in file.rows():
        found.splits.append(
            StepSplit(
                device=row.text(device),
                step=row.text(step),
                computing_us=row.ns(computing, most=LONGEST_STEP_NS) / 1e3,
                communication_us=row.ns(communication, most=LONGEST_STEP_NS) / 1e3,
                not_overlapped_us=row.ns(shown, most=LONGEST_STEP_NS) / 1e3,
                overlapped_us=row.ns(hidden, most=LONGEST_STEP_NS) / 1e3,
                free_us=row.ns(free, most=LONGEST_STEP_NS) / 1e3,
            )
        )


def _read_host(file: CsvFile, found: _Found) -> None:
    name, host, device = file.column("Name"), file.time("Host Self Duration"), file.time("Device Self Duration")
    for row in file.rows():
        on_host, on_device = found.host.setdefault(row.text(name), (Calls(), Calls()))
        on_host.add(row.ns(host, most=LONGEST_STEP_NS))
        on_device.add(row.ns(device, most=LONGEST_STEP_NS))


_READERS = {_KERNELS: _read_kernels, _STATISTIC: _read_statistic, _STEPS: _read_steps, _HOST: _read_host}


def _table(found: dict[_Operator, Calls]) -> OperatorTable:
    return table(
        OperatorRow(
            operator=operator,
            core=core,
            device=device,
            shapes=shapes,
            dtypes=dtypes,
            num_calls=calls.num,
            **calls.as_us(),
        )
        for (operator, core, device, shapes, dtypes), calls in found.items()
    )


def _collectives(found: dict[_Transfer, Calls]) -> list[CollectiveRow]:
    rows = [
        CollectiveRow(
            collective=name, device=device, group=group, message_bytes=size, num_calls=calls.num, **calls.as_us()
        )
        for (name, device, group, size), calls in found.items()
    ]
    return sorted(rows, key=lambda r: (-r.total_us, r.collective, r.device, r.group, r.message_bytes or 0))


def _host_operators(found: dict[str, tuple[Calls, Calls]]) -> list[HostOperator]:
    rows = [
        HostOperator(operator=name, num_calls=host.num, host_us=host.total_ns / 1e3, device_us=device.total_ns / 1e3)
        for name, (host, device) in found.items()
    ]
    return sorted(rows, key=lambda r: (-r.host_us, r.operator))


def _hidden_lengths(operators: OperatorTable) -> list[str]:
    calls: dict[str, int] = {}
    for row in operators.rows:
        if row.hides_lengths:
            calls[row.operator] = calls.get(row.operator, 0) + row.num_calls
    return [
        f"{name}: {num} calls read paged KV; their K and V shapes are the whole pool, the lengths are not recorded"
        for name, num in sorted(calls.items())
    ]

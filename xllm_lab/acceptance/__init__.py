"""Whether a machine serves as it must, and all that the simulator needs to know of it: one command, one folder.

    operators   each beside its definition                  profile/          operator times
    logits      beside the CPU's                            full/, graphs/,   the demo's trace, served
    graphs      tokens of captured steps, and of eager      paced/
    drafts      tokens with speculation, and without        calibration.json  step times, eager and replayed
    memory      blocks and requests, when it is short       simulated/        the trace, in simulated time
    parity      decisions, beside the simulator's

A check that fails does not stop those after it: a maintainer wants to know all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from xllm_lab import provenance
from xllm_lab.acceptance.machine import MachineUnderTest, Options
from xllm_lab.acceptance.replays import calibration, parity_of_runs, profile, replays, simulation
from xllm_lab.acceptance.serving import drafts, graphs, logits, memory, operators
from xllm_lab.errors import PolicyError, UserError
from xllm_lab.progress import tell
from xllm_lab.runs import new_folder, write_json

__all__ = ["PLAN", "Acceptance", "Options", "Part", "accept", "plan_text"]


class Part(NamedTuple):
    """One part of the plan.

    Attributes:
        what: it does, in one phrase.
        run: returns what it found, one phrase each, with whether it is as it must be.
    """

    name: str
    what: str
    run: Callable[[MachineUnderTest], Iterator[tuple[bool, str]]]


PLAN = (
    Part("operators", "every operator that serves the model, beside its definition in float32 on the CPU", operators),
    Part("logits", "of packed prompts, of chunks of them and of decodes, beside a CPU's in plain PyTorch", logits),
    Part("graphs", "the same tokens eager, in captured graphs, and planned ahead", graphs),
    Part("drafts", "the same tokens with drafts by lookup, eager and in graphs", drafts),
    Part("memory", "no block and no request lost where KV is short; a pool that does not fit is refused", memory),
    Part("profile", "the operators' times, for `simulate --profile`", profile),
    Part("replay", "a trace all at once, eager and in graphs, and at the rate that it can take", replays),
    Part("parity", "the simulator decides every step of those runs as the engine did", parity_of_runs),
    Part("calibration", "step times, eager and replayed, from those runs", calibration),
    Part("simulation", "a run that was not learnt from, beside what is predicted of it", simulation),
)


class Finding(NamedTuple):
    """What a part found."""

    part: str
    passed: bool
    told: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """The outcome; the folder has the rest."""

    path: Path
    device: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = [finding._asdict() for finding in self.findings]
        return {"passed": self.passed, "device": self.device, "findings": found}

    def as_text(self) -> str:
        """What failed, and where everything is."""
        failed = [f"NO    {f.part}: {f.told}" for f in self.findings if not f.passed]
        count = f"{sum(f.passed for f in self.findings)} of {len(self.findings)} as they must be on {self.device}"
        return "\n".join((*failed, f"{count}\n{self.path}"))


def plan_text() -> str:
    """The plan, a line for each part."""
    return "\n".join(f"{k}  {part.name:<11}  {part.what}" for k, part in enumerate(PLAN, 1))


def accept(options: Options, out: Path) -> Acceptance:
    """Carry out the plan on a device, and write the folder.

    Raises:
        ConfigError: there is no such device, and what is missing.
        ModelError: the model cannot be loaded.
        RunError: the folder exists, or cannot be written.
    """
    with new_folder(out) as folder:
        machine = MachineUnderTest(options, folder)
        tell(f"{machine.engine.device.description}, {options.model}")
        findings = [finding for part in PLAN for finding in _found(part, machine)]
        done = Acceptance(path=out, device=machine.engine.device.description, findings=tuple(findings))
        told = {**done.as_dict(), "options": asdict(options), "model": machine.engine.describe()}
        told |= {"versions": provenance.versions(), "commit": provenance.commit(), "hardware": provenance.hardware()}
        write_json(folder / "acceptance.json", told)
    return done


def _found(part: Part, machine: MachineUnderTest) -> Iterator[Finding]:
    tell(f"{part.name}: {part.what}")
    try:
        for passed, told in part.run(machine):
            tell(f"  {'yes' if passed else 'NO '}  {told}")
            yield Finding(part.name, passed, told)
    except (UserError, PolicyError, RuntimeError) as error:  # the device's own errors are RuntimeErrors
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        tell(f"  NO   {told}")
        yield Finding(part.name, False, told)

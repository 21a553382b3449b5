"""From what was measured to production, and what is said of configurations there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xllm_lab.verbs.given import (
    PathLike,
    workload_of,
)
from xllm_lab.workload import Workload

if TYPE_CHECKING:
    from xllm_lab.tuning.drift import Drift
    from xllm_lab.tuning.export import Export
    from xllm_lab.tuning.lint.linter import Lint
    from xllm_lab.tuning.lint.rules import Rule
    from xllm_lab.tuning.lint.settings import Situation
    from xllm_lab.tuning.promote import Promotion, Refusal, Terms
    from xllm_lab.tuning.verify import Verification


def promote(
    verification: PathLike, *, to: str, out: PathLike, version: str | None = None, terms: Terms | None = None
) -> tuple[Promotion | None, list[Refusal]]:
    """Hand the candidate of a verification to production, or say why not; see `tuning.promote.promote`.

    Args:
        to: a name of `tuning.export.targets()`.
    """
    from xllm_lab.tuning.promote import promote as pass_gate

    return pass_gate(Path(verification), to=to, out=Path(out), version=version, terms=terms)


def drift(trace: Workload | PathLike, *, promoted: Promotion | PathLike) -> Drift:
    """Whether a live trace left what a configuration was promoted for, and what that costs; see `tuning.drift`."""
    from xllm_lab.tuning.drift import drift as look
    from xllm_lab.tuning.promote import Promotion, read_promotion

    found = promoted if isinstance(promoted, Promotion) else read_promotion(Path(promoted))
    return look(workload_of(trace), found)


def export(verification: Verification | PathLike, *, to: str, version: str | None = None) -> Export:
    """What production reads, for the winner of a verification: the default unless the tuned one measured better.

    Args:
        to: a name of `tuning.export.targets()`.
        version: of the target; None is the latest that is known.
    """
    from xllm_lab.tuning.export import export as translate
    from xllm_lab.tuning.verify import Verification, read_verification

    done = verification if isinstance(verification, Verification) else read_verification(Path(verification))
    return translate(done.winner, to, kv_bytes_per_token=done.model["kv_bytes_per_token"], version=version)


def lint(config: PathLike, situation: Situation | None = None, *, fix: bool = False) -> Lint:
    """What is wrong with a configuration of xLLM or vLLM-Ascend, see `tuning.lint`.

    Args:
        situation: version, platform, model and device, as far as they are known.
        fix: repair what can be repaired; the result's text is in `config.text`, and the file stays as it is.

    Raises:
        ConfigError: no configuration can be read there.
    """
    from xllm_lab.tuning.lint.linter import lint as look
    from xllm_lab.tuning.lint.linter import repair
    from xllm_lab.tuning.lint.reading import read_configuration

    found = look(read_configuration(config), situation)
    return repair(found) if fix else found


def lint_rules() -> tuple[Rule, ...]:
    """Every rule of `lint`."""
    from xllm_lab.tuning.lint.rules import every_rule

    return every_rule()

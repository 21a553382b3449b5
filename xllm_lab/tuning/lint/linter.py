"""Lint a configuration, and repair it."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_lab.tuning.lint.configuration import Configuration
from xllm_lab.tuning.lint.finding import Finding, Repair, Severity
from xllm_lab.tuning.lint.reading import parse_again
from xllm_lab.tuning.lint.rewriting import rewritten
from xllm_lab.tuning.lint.rules import every_rule
from xllm_lab.tuning.lint.settings import Settings, Situation

_ROUNDS = 100
_LONGEST = 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class Lint:
    """What was found in a configuration.

    Attributes:
        findings: errors first, then by line.
        repaired: what was found before and repaired, in order.
    """

    config: Configuration
    situation: Situation
    findings: tuple[Finding, ...]
    repaired: tuple[Finding, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Nothing but notes."""
        return all(found.severity is Severity.NOTE for found in self.findings)


def lint(config: Configuration, situation: Situation | None = None) -> Lint:
    """Everything that the rules find."""
    settings = Settings(config, situation or Situation())
    findings = [
        Finding(
            rule=rule.id,
            severity=rule.severity,
            says=_one_line(found.says),
            source=found.source or rule.source,
            names=found.names,
            line=next((line for name in found.names if (line := settings.line(name)) is not None), None),
            repair=found.repair,
        )
        for rule in every_rule()
        if rule.applies(settings)
        for found in rule.finds(settings)
    ]
    order = list(Severity)
    findings.sort(key=lambda found: (order.index(found.severity), found.line or 0, found.rule, found.names))
    return Lint(config=config, situation=settings.situation, findings=tuple(findings))


def repair(found: Lint) -> Lint:
    """The configuration after all repairs that there are, and what is left to be found in it."""
    repaired: list[Finding] = []
    texts = {found.config.text}
    for _ in range(_ROUNDS):
        fixable = [finding for finding in found.findings if finding.repair is not None]
        if not fixable:
            break
        first, *rest = fixable
        assert first.repair is not None
        text = rewritten(found.config, first.repair)
        taken = _touched(first.repair)
        done = [first]
        config = parse_again(found.config, text)
        for finding in rest:
            # One repair may make another one needless, or wrong: those of other settings go on, the rest wait.
            if finding.repair is not None and not taken & _touched(finding.repair):
                config = parse_again(config, rewritten(config, finding.repair))
                taken |= _touched(finding.repair)
                done.append(finding)
        if config.text in texts:
            break
        texts.add(config.text)
        repaired += done
        found = lint(config, found.situation)
    return Lint(config=found.config, situation=found.situation, findings=found.findings, repaired=tuple(repaired))


def _touched(one: Repair) -> set[str]:
    return {*one.put, *one.removed, *one.renamed, *one.renamed.values(), *one.only_last}


def _one_line(text: str) -> str:
    told = " ".join(text.split())
    return told if len(told) <= _LONGEST else f"{told[:_LONGEST]}..."

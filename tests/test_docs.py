"""Pages of the manual that are written from the code say what the code says."""

from __future__ import annotations

from pathlib import Path

from xllm_lab import verbs
from xllm_lab.text import policies_page, rules_page

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_of_policies_is_as_the_command_writes_it() -> None:
    """`xllm-lab policies --markdown > docs/policies.md`."""
    assert (DOCS / "policies.md").read_text(encoding="utf-8") == policies_page(verbs.catalogue()) + "\n"


def test_the_page_of_lint_rules_is_as_the_command_writes_it() -> None:
    """`xllm-lab lint --rules > docs/lint.md`."""
    assert (DOCS / "lint.md").read_text(encoding="utf-8") == rules_page(verbs.lint_rules()) + "\n"

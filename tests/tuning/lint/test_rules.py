"""Every rule finds what it is about, and nothing else does; a configuration that was repaired says so no more."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tuning.lint.configurations import beside, harmless, serious, situation, texts
from xllm_lab.tuning.lint.configuration import Kind
from xllm_lab.tuning.lint.finding import Severity
from xllm_lab.tuning.lint.flag_table import LATEST
from xllm_lab.tuning.lint.linter import lint, repair
from xllm_lab.tuning.lint.reading import parse_configuration
from xllm_lab.tuning.lint.rules import Rule, every_rule

RULES = {rule.id: rule for rule in every_rule()}


def test_rules_are_many_and_their_ids_are_their_own() -> None:
    """Of both kinds, of every severity."""
    assert len(RULES) == len(every_rule()) > 100
    assert {rule.kind for rule in every_rule()} == set(Kind)
    assert {rule.severity for rule in every_rule()} == set(Severity)


@pytest.mark.parametrize("rule", every_rule(), ids=lambda rule: rule.id)
def test_a_rule_says_on_what_it_rests(rule: Rule) -> None:
    """A file of ours, or a version, a path and a line or symbol of somebody else's."""
    own = r"[a-z_]+\.csv"
    line = r"(xllm|vllm|vllm-ascend)@[0-9a-z.]+ [\w/.-]+(:\d+| \(\w+\)|/|\.md)"
    other = r"https://\S+|gflags 2\.2 .*|PyYAML 6 .*"
    assert re.search(f"^({own}|.*{line}.*|{other})", rule.source), rule.source


@pytest.mark.parametrize("rule", every_rule(), ids=lambda rule: rule.id)
@settings(max_examples=6)
@given(data=st.data())
def test_an_example_breaks_its_rule_and_no_other(rule: Rule, data: st.DataObject) -> None:
    """Whatever harmless is beside it; repaired, nothing is left of it but what was beside."""
    known = situation(rule.example_situation)
    alone = parse_configuration(rule.example, "it")
    assert alone.kind is rule.kind
    extra = data.draw(harmless(rule.kind, known.version))
    found = lint(parse_configuration(beside(alone, extra), "it"), known)
    assert rule.id in {one.rule for one in found.findings}
    assert serious(found) == ({rule.id} if rule.severity is not Severity.NOTE else set())
    after = repair(found)
    assert bool(after.repaired) == rule.is_repaired
    if rule.is_repaired:
        assert rule.id not in {one.rule for one in after.findings}
        assert not serious(after)
    assert after.config.entries.keys() >= extra.keys()
    assert all(one.line is None or 1 <= one.line <= found.config.text.count("\n") + 1 for one in found.findings)


@given(data=st.data())
def test_what_is_harmless_is_not_talked_about(data: st.DataObject) -> None:
    """Or the examples above would be found for another reason."""
    kind = data.draw(st.sampled_from(Kind))
    extra = data.draw(harmless(kind, LATEST))
    alone = parse_configuration("max_num_seqs: 64\n" if kind is Kind.VLLM else "--max_seqs_per_batch=64\n", "it")
    assert lint(parse_configuration(beside(alone, extra), "it")).findings == ()


@pytest.mark.parametrize("rule", [r for r in every_rule() if len(r.versions) < 11], ids=lambda rule: rule.id)
def test_a_rule_of_some_versions_is_silent_in_others(rule: Rule) -> None:
    """Those next to the ones that it holds for."""
    names = [version for version in RULES["unknown-flag"].versions if version not in rule.versions]
    alone = parse_configuration(rule.example, "it")
    for version in names:
        found = lint(alone, situation({**rule.example_situation, "version": version}))
        assert rule.id not in {one.rule for one in found.findings}


@settings(max_examples=150, deadline=None)
@given(texts())
def test_repairs_come_to_an_end(text: str) -> None:
    """No repair is left to be made, and made again they change nothing."""
    after = repair(lint(parse_configuration(text, "it")))
    assert not [one for one in after.findings if one.repair is not None]
    assert repair(lint(after.config)).config.text == after.config.text


@settings(max_examples=60, deadline=None)
@given(texts())
def test_repairs_leave_alone_what_is_right(text: str) -> None:
    """Settings that no finding names stay as they were."""
    found = lint(parse_configuration(text, "it"))
    after = repair(found)
    touched = {name for one in after.repaired for name in one.names}
    for one in after.repaired:
        if one.repair is not None:
            touched |= {*one.repair.put, *one.repair.removed, *one.repair.renamed, *one.repair.renamed.values()}
    for name, entry in found.config.entries.items():
        if not any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in touched):
            assert str(after.config.entries[name].value) == str(entry.value)


def test_findings_are_sorted() -> None:
    """Errors first, then by line."""
    text = "--enable_multi_stream_parallel=true\n--colour=red\n--use_zero_evict=true\n--block_size=0\n"
    found = lint(parse_configuration(text, "it")).findings
    keys = [(list(Severity).index(one.severity), one.line or 0) for one in found]
    assert all(a <= b for a, b in pairwise(keys))
    assert [one.line for one in found] == [2, 4, 1, 3]

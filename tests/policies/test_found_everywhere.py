"""A new policy is one class in one module: whatever lists policies, knobs or options finds it there.

The module is written as its author would write it, for every decision that there is, and nothing else is told of it.
"""

from __future__ import annotations

import argparse
import ast
import itertools
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import NamedTuple

import optuna
import pytest

from tests.test_layers import is_within, modules, tree
from xllm_lab import cli, contract, verbs
from xllm_lab.candidate import Candidate, candidate, num_changes
from xllm_lab.cli.machine import fleet, fleet_options
from xllm_lab.cli.options import configuration, configuration_options
from xllm_lab.fleet_config import FLEET_DECISIONS, FleetConfig
from xllm_lab.policies import catalog
from xllm_lab.policies.catalog import decisions, make_policy, policies, policy_name
from xllm_lab.policies.of_instance import BESIDE, DECISIONS, policies_from
from xllm_lab.report.tables import configurations
from xllm_lab.settings import DEFAULT
from xllm_lab.tuning.export import export
from xllm_lab.tuning.space import Space

MODULE = '''"""Of another package."""
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Knob
from {module} import {base}


@dataclass(frozen=True, slots=True, kw_only=True)
class Newcomer{kind}({base}):
    """As the one that it was made from, and nobody heard of it."""

    decides: ClassVar[str] = "{decides}"
    made_up_knob: Annotated[int, Knob(1, 9)] = 3
'''
_numbers = itertools.count()


class Newcomer(NamedTuple):
    """A policy that was not there when the package was written."""

    decides: str
    name: str

    @property
    def option(self) -> str:
        return "--policy" if self.decides == "batch" else f"--{self.decides}"

    @property
    def prefix(self) -> str:
        """Before its knob, where several parts are listed together."""
        return "" if self.decides == "batch" else f"{self.decides}."

    def in_a_fleet(self, *settings: str) -> Candidate:
        """As the command reads it, where a router decides."""
        parser = argparse.ArgumentParser()
        fleet_options(parser)
        knobs = f":{','.join(settings)}" if settings else ""
        return replace(DEFAULT, fleet=fleet(parser.parse_args(["--instances", "3", self.option, self.name + knobs])))

    def chosen(self, *settings: str) -> Candidate:
        """As the command reads it."""
        if self.decides in FLEET_DECISIONS:
            return self.in_a_fleet(*settings)
        words = [self.option, self.name, *(word for setting in settings for word in ("--set", setting))]
        parser = argparse.ArgumentParser()
        configuration_options(parser)
        return verbs.configure(**configuration(parser.parse_args(words)))


@pytest.fixture
def newcomer(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Newcomer]:
    """Installed for a test, in a module that no other test imported."""
    decides: str = request.param
    model = type(getattr(DEFAULT.policies, decides)) if decides in DECISIONS else next(iter(policies(decides).values()))
    module = f"made_up_policies_{next(_numbers)}"
    text = MODULE.format(module=model.__module__, base=model.__name__, kind=decides.title(), decides=decides)
    (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
    own = EntryPoint(name="outside", value=module, group=catalog.ENTRY_POINT_GROUP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(catalog, "entry_points", lambda group: [own])
    catalog._modules.cache_clear()
    yield Newcomer(decides, f"newcomer-{decides}")
    catalog._modules.cache_clear()


of_any_kind = pytest.mark.parametrize("newcomer", decisions(), indirect=True)
of_those_that_are_tuned = pytest.mark.parametrize("newcomer", [*DECISIONS, *FLEET_DECISIONS], indirect=True)
of_an_instance = pytest.mark.parametrize("newcomer", DECISIONS, indirect=True)


@of_any_kind
def test_it_is_listed_with_its_knob(newcomer: Newcomer, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, and on the page of the manual that the command writes."""
    for option in ((), ("--markdown",)):
        assert cli.run(["policies", *option]) == 0
        listed = capsys.readouterr().out.partition(newcomer.name)[2]
        assert "As the one that it was made from, and nobody heard of it." in listed.splitlines()[0]
        assert "made_up_knob" in listed
        assert "3; 1 to 9" in listed


@of_any_kind
def test_it_is_held_to_the_laws(newcomer: Newcomer) -> None:
    """By those of its kind, which it does not break."""
    assert contract.legal(make_policy(newcomer.decides, newcomer.name), 20) == []


@of_an_instance
def test_it_is_an_option_and_its_knob_a_setting(newcomer: Newcomer) -> None:
    """Under the knob's name, and under the decision's and the knob's."""
    assert policy_name(getattr(newcomer.chosen().policies, newcomer.decides)) == newcomer.name
    for setting in ("made_up_knob=7", f"{newcomer.decides}.made_up_knob=7"):
        assert getattr(newcomer.chosen(setting).policies, newcomer.decides).made_up_knob == 7


@of_an_instance
def test_it_is_kept_and_read_back(newcomer: Newcomer) -> None:
    """In manifests, in studies, and in the table of a report; another policy is one change."""
    own = newcomer.chosen("made_up_knob=7")
    assert policies_from(own.policies.as_dict()) == own.policies
    assert candidate(own.as_dict()) == own
    assert num_changes(own, DEFAULT) == 1
    assert num_changes(own, newcomer.chosen()) == 1
    assert f"{newcomer.prefix}made_up_knob" in configurations(DEFAULT.as_dict(), own.as_dict())


@of_those_that_are_tuned
def test_a_tuner_searches_its_knob(newcomer: Newcomer) -> None:
    """As the default's own policy, and as one to choose from, where only those drawn have their knobs drawn."""
    where = f"{newcomer.decides if newcomer.prefix else newcomer.name}.made_up_knob"
    assert Space(newcomer.chosen()).describe()["knobs"][where] == [1, 9, False]
    default = replace(DEFAULT, fleet=FleetConfig(num_instances=3))
    space = Space(default, [newcomer.name])
    assert space.describe()["policies"][newcomer.decides][1] == newcomer.name
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    found = set()
    for _ in range(60):
        trial = study.ask()
        drawn = dict(space.suggest(trial).decided())[newcomer.decides]
        assert (policy_name(drawn) == newcomer.name) == any("made_up_knob" in name for name in trial.params)
        found.add(getattr(drawn, "made_up_knob", None))
        study.tell(trial, 0.0)
    assert found == {None, *range(1, 10)}


@pytest.mark.parametrize("newcomer", FLEET_DECISIONS, indirect=True)
def test_a_fleets_is_kept_and_read_back(newcomer: Newcomer) -> None:
    """In studies, and in the table of a report; its knob is one change, and so is another policy."""
    own = newcomer.chosen("made_up_knob=7")
    assert candidate(own.as_dict()) == own
    assert num_changes(own, newcomer.chosen()) == 1
    assert f"{newcomer.prefix}made_up_knob" in configurations(DEFAULT.as_dict(), own.as_dict())
    assert export(own, "xllm", kv_bytes_per_token=1).left_out[newcomer.decides] == newcomer.name


@of_an_instance
def test_an_export_says_that_xllm_has_no_such_knob(newcomer: Newcomer) -> None:
    """Its flags are inherited; what was made up is left out by name."""
    assert export(newcomer.chosen(), "xllm", kv_bytes_per_token=1).left_out[f"{newcomer.prefix}made_up_knob"] == 3


# All that lists, keeps, searches, translates or shows what others decide.
LISTERS = ("cli", "verbs", "settings", "candidate", "runs", "tuning", "report", "text", "summary_of_run", "demo")


# Another system's format has words for some decisions; what it has none for is left out, and told.
TRANSLATORS = ("xllm_lab.tuning.export.vllm",)


def test_nobody_who_lists_decisions_names_one() -> None:
    """Neither as a word nor as a field: a list that is kept by hand would be the second one."""
    listers = [
        module
        for module in modules()
        if is_within(module, *(f"xllm_lab.{name}" for name in LISTERS)) and module not in TRANSLATORS
    ]
    assert len(listers) > len(LISTERS)
    named = [
        f"{module}:{node.lineno}"
        for module in listers
        for node in ast.walk(tree(module))
        if (isinstance(node, ast.Constant) and node.value in BESIDE)
        or (isinstance(node, ast.Attribute) and node.attr in BESIDE and ast.unparse(node) != "functools.cache")
        or (isinstance(node, ast.arg | ast.keyword) and node.arg in BESIDE)
    ]
    assert named == []


def test_nobody_who_tunes_names_a_decision_of_a_fleet() -> None:
    """Hosts, routers and their files do, and ask for what they need."""
    tuners = [module for module in modules() if is_within(module, "xllm_lab.tuning", "xllm_lab.candidate")]
    named = [
        f"{module}:{node.lineno}"
        for module in tuners
        for node in ast.walk(tree(module))
        if (isinstance(node, ast.Constant) and node.value in FLEET_DECISIONS)
        or (isinstance(node, ast.Attribute) and node.attr in FLEET_DECISIONS)
    ]
    assert tuners
    assert named == []

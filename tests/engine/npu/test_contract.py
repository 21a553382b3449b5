"""Our calls against the operators' schemas in two releases of torch_npu, without either: facts, and torch's dispatcher.

The operators are defined from the facts under another name, and each adapter calls them there. A renamed argument, one
of another kind, or a mode that became mandatory is then found by whatever torch itself finds.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.engine.npu.samples import CALLS
from tests.engine.npu.schema_facts import VERSIONS, Facts, facts_of, read_facts, schema
from xllm_lab.engine.ops.npu.operators import OPERATORS, calling

_numbers = itertools.count()


@contextmanager
def operators(facts: Facts) -> Iterator[Any]:
    """A namespace of the dispatcher with these operators, computed by the references."""
    name = f"xllm_lab_contract_{next(_numbers)}"
    library = torch.library.Library(name, "DEF")  # type: ignore[no-untyped-call]
    try:
        for operator, own in facts.items():
            library.define(schema(operator, own))  # type: ignore[no-untyped-call]
            library.impl(operator, OPERATORS[operator].reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        namespace = getattr(torch.ops, name)
        with calling(namespace):
            yield namespace
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def test_there_is_a_sample_and_a_fact_for_each_operator() -> None:
    """So that an operator that is declared is also tested."""
    assert set(CALLS) == set(OPERATORS)
    for version in VERSIONS:
        assert set(read_facts(version)) == set(OPERATORS)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_a_release_accepts_our_call(operator: str, version: str) -> None:
    with operators(read_facts(version)):
        CALLS[operator]()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_references_and_limits_name_arguments_as_the_schema_does(operator: str, version: str) -> None:
    """In the schema's order where that counts, and by keyword where it says so."""
    arguments = {name: kind for name, _, kind, _ in read_facts(version)[operator]["arguments"]}
    for function in (OPERATORS[operator].reference, OPERATORS[operator].limits):
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if function is OPERATORS[operator].limits and operator.endswith("_workspace"):
            named = [p for p in named if p.name not in ("workspace", "out")]  # those of the call that it prepares
        by_place = [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
        assert by_place == list(arguments)[: len(by_place)]
        for parameter in named:
            keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
            assert arguments.get(parameter.name) == ("keyword" if keyword else "positional"), parameter.name


def passed() -> list[tuple[str, str]]:
    """Each argument that a call passes by keyword, by operator."""
    seen = []
    for operator, declared in OPERATORS.items():
        for parameter in inspect.signature(declared.limits).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is inspect.Parameter.empty:
                seen.append((operator, parameter.name))
    return seen


@pytest.mark.parametrize(("operator", "argument"), passed())
def test_a_renamed_argument_is_found(operator: str, argument: str) -> None:
    """In doctored facts, for every argument that we pass by name."""
    facts = copy.deepcopy(read_facts("2.13.0"))
    (found,) = [entry for entry in facts[operator]["arguments"] if entry[0] == argument]
    found[0] = f"{argument}_renamed"
    with operators(facts), pytest.raises((RuntimeError, TypeError), match=argument):
        CALLS[operator]()


@pytest.mark.parametrize(
    ("operator", "index", "change"),
    [
        ("npu_rms_norm", 2, ("epsilon", "float", "keyword", "1e-06")),
        ("npu_rotary_mul", 3, ("rotary_mode", "int", "positional", "0")),
        ("npu_scatter_pa_kv_cache", 5, ("compress_lens", "Tensor", "keyword", None)),
        ("npu_swiglu", 1, ("approximate", "str", "positional", "'tanh'")),
    ],
)
def test_another_kind_of_argument_is_found(operator: str, index: int, change: tuple[Any, ...]) -> None:
    """Keyword only, of another type, or mandatory."""
    facts = copy.deepcopy(read_facts("2.13.0"))
    facts[operator]["arguments"][index] = list(change)
    with operators(facts), pytest.raises((RuntimeError, TypeError)):
        CALLS[operator]()


def test_a_removed_operator_is_found() -> None:
    facts = copy.deepcopy(read_facts("2.13.0"))
    del facts["npu_swiglu"]
    with operators(facts), pytest.raises(AttributeError, match="npu_swiglu"):
        CALLS["npu_swiglu"]()


def test_facts_give_the_schema_back() -> None:
    """Taken apart and put together again, the text is the same."""
    text = "npu_op.out(Tensor x, Tensor(a!) y, *, int[2] range=[], str mode='half', Tensor? z=None) -> (Tensor, Tensor)"
    assert schema("npu_op.out", facts_of(text)) == text

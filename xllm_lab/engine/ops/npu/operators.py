"""One declaration for each operator of torch_npu: its name, its documented limits, and what it computes.

    calls.py     @adapts("npu_rms_norm", limits.npu_rms_norm, references.npu_rms_norm)
                 def rms_norm(op, ...)  ->  `op(...)` checks, if asked to, and calls torch.ops.npu.npu_rms_norm

`OPERATORS` is filled by that decorator, so that nothing else has to list them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
Send = Callable[..., Any]


class Operator(NamedTuple):
    """An operator that the engine knows how to call.

    Attributes:
        name: in the namespace `npu`, with its overload: "npu_fused_infer_attention_score.out".
        limits: called with an operator's arguments; raises `LimitError` for what its documentation rules out.
        reference: computes the same in plain torch; parameters are named as in the operator's schema.
    """

    name: str
    limits: Callable[..., None]
    reference: Callable[..., Any]


class LimitError(ValueError):
    """An argument outside of what an operator's documentation accepts: our own mistake, found before the device's."""


OPERATORS: dict[str, Operator] = {}


class _Calls:
    """Where calls go. Tests put a namespace of their own here."""

    namespace: Any = None
    checks = False


_calls = _Calls()


def adapts(
    name: str, limits: Callable[..., None], reference: Callable[..., Any]
) -> Callable[[Callable[Concatenate[Send, P], R]], Callable[P, R]]:
    """Declares an operator and binds the function that calls it; its first argument is how to."""
    assert name not in OPERATORS, f"{name} twice"
    OPERATORS[name] = Operator(name, limits, reference)
    send = functools.partial(_send, name)

    def bind(adapter: Callable[Concatenate[Send, P], R]) -> Callable[P, R]:
        @functools.wraps(adapter)
        def call(*arguments: P.args, **named: P.kwargs) -> R:
            return adapter(send, *arguments, **named)

        return call

    return bind


@contextlib.contextmanager
def calling(namespace: Any) -> Iterator[None]:
    """Operators are those of `namespace` meanwhile, and not those of torch_npu."""
    before, _calls.namespace = _calls.namespace, namespace
    try:
        yield
    finally:
        _calls.namespace = before


def check_calls(*, on: bool) -> None:
    """Whether each call is held against the operator's limits first."""
    _calls.checks = on


def _send(name: str, *arguments: Any, **named: Any) -> Any:
    if _calls.checks:
        OPERATORS[name].limits(*arguments, **named)
    packet, _, overload = name.partition(".")
    found = getattr(_calls.namespace or torch.ops.npu, packet)
    return (getattr(found, overload) if overload else found)(*arguments, **named)

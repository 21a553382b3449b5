"""The contract of policies: laws that any policy must obey, ours or yours, whatever it decides.

    from xllm_lab.contract import check_policy
    check_policy(MyPolicy())  # sentences, each beginning with the law that is broken; none if all is well

    legal           its plans keep the checks of its kind, on every view; a batch is empty only if nothing can run
    repeatable      the same view, or an equal copy of it, gives the same plan
    order-free      the order in which a view lists its requests or instances means nothing
    identity-free   ids break ties and mean nothing else
    pure            the view is left as it was
    clockless       no clock, no chance, no imports that could bring them
    hash-free       hash randomisation changes nothing
    live            a batch policy that drives the real scheduler serves every request in a bounded number of steps
    unbroken        a shapes policy that treats two contexts alike treats those between alike, too
    holds           and where it says that a plan holds for further steps, running them in one go changes no record

What a kind of policy may meet is in `policy_kinds`. A view that breaks a law is drawn again by its number:
`KINDS["batch"].drawn_view(number)`.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import inspect
import json
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby, zip_longest
from typing import Any, ClassVar, Protocol

from xllm_lab.drawn_views import STEP_TIME, drawn_scene
from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.catalog import configured, values_of
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policy_kinds import KINDS, Kind
from xllm_lab.records import Records, StepRecord
from xllm_lab.scheduler import Scheduler
from xllm_lab.serving import Completion, Idle, Woke, WorkloadFeed, serve
from xllm_lab.workload import Workload, prompt_token_ids

NUM_VIEWS = 200
NUM_WORKLOADS = 20
# What a policy may import. None of these reads a clock or draws a number.
PURE_MODULES = frozenset(
    {
        "__future__",
        "abc",
        "bisect",
        "collections",
        "dataclasses",
        "enum",
        "fractions",
        "functools",
        "heapq",
        "itertools",
        "math",
        "numbers",
        "numpy",
        "operator",
        "types",
        "typing",
    }
)
# How long steps last while plans hold: much and little happens meanwhile.
_STEPS_US = (1, 30)
_MOST_STEPS = 5000
PURE_PACKAGES = ("xllm_lab.policies", "xllm_lab.errors")
_CLOCKS = tuple(c + unit for c in ("time", "monotonic", "perf_counter", "process_time") for unit in ("", "_ns"))
_DICE = ("random", "randint", "randrange", "uniform", "choice", "choices", "shuffle", "sample", "getrandbits")


class Policy(Protocol):
    """A policy of any kind."""

    decides: ClassVar[str]

    def decide(self, view: Any) -> Any: ...


def check_policy(policy: Policy, *, num_views: int = NUM_VIEWS) -> list[str]:
    """Every law that the policy breaks, one sentence for each; none if it obeys them all.

    Raises:
        ConfigError: it decides something that nobody here knows.
    """
    if broken := legal(policy, num_views):
        return broken  # the others would only say so again
    laws = (repeatable, order_free, identity_free, pure, clockless)
    found = [sentence for law in laws for sentence in law(policy, num_views)] + hash_free(policy)
    if policy.decides == "shapes":
        found += unbroken(policy, num_views)
    return found + ((live(policy) or holds(policy)) if policy.decides == "batch" else [])


def legal(policy: Policy, num_views: int = NUM_VIEWS) -> list[str]:
    """Plans that the host would refuse, and for a batch policy idling while a request could run."""
    kind = _kind(policy)

    def broken(view: Any) -> str | None:
        try:
            plan = policy.decide(view)
        except Exception as error:  # whatever an author's code may raise
            return f"raises {error!r}"
        return "; ".join(kind.violations(view, plan)) or None

    return _first_broken("legal", policy, broken, num_views)


def repeatable(policy: Policy, num_views: int = NUM_VIEWS) -> list[str]:
    """Memory between decisions, and decisions that depend on where objects lie."""
    kind = _kind(policy)

    def broken(view: Any) -> str | None:
        same = (view, view, copy.deepcopy(view), kind.drawn_view(view.number))
        plans = {kind.answer(v, policy.decide(v)) for v in same}
        return f"answers the same view with {len(plans)} plans" if len(plans) > 1 else None

    return _first_broken("repeatable", policy, broken, num_views)


def order_free(policy: Policy, num_views: int = NUM_VIEWS) -> list[str]:
    """Orderings that leave equals in the order of the view, for want of an id at the end of the key."""
    kind = _kind(policy)

    def broken(view: Any) -> str | None:
        plans = {kind.answer(v, policy.decide(v)) for v in (view, *kind.relisted(view))}
        return "plans otherwise when the view is listed otherwise" if len(plans) > 1 else None

    return _first_broken("order-free", policy, broken, num_views)


def identity_free(policy: Policy, num_views: int = NUM_VIEWS) -> list[str]:
    """Ids that are read for more than their order."""
    kind = _kind(policy)

    def other_id(some_id: int) -> int:
        return 1_000_003 * some_id + 17

    def broken(view: Any) -> str | None:
        other = copy.deepcopy(view)
        kind.rename(other, other_id)
        expected = kind.renamed(kind.answer(view, policy.decide(view)), other_id)
        same = kind.answer(other, policy.decide(other)) == expected
        return None if same else "plans otherwise when the ids are others in the same order"

    return _first_broken("identity-free", policy, broken, num_views)


def pure(policy: Policy, num_views: int = NUM_VIEWS) -> list[str]:
    """Writing to what was shown."""

    def broken(view: Any) -> str | None:
        before = asdict(view)
        policy.decide(view)
        changed = [name for name, value in asdict(view).items() if value != before[name]]
        return f"writes to the view: {', '.join(changed)}" if changed else None

    return _first_broken("pure", policy, broken, num_views)


def unbroken(policy: ShapesPolicy, num_views: int = NUM_VIEWS) -> list[str]:
    """Graphs that come back as contexts grow: a host that skips steps looks for the one step where they change."""

    def broken(view: Any) -> str | None:
        shown = copy.copy(view)
        contexts = {*range(view.max_context_tokens, view.max_context_tokens + 70)}
        contexts |= {*range(max(view.max_context_tokens, view.max_model_len - 3), view.max_model_len + 1)}
        plans = []
        for shown.max_context_tokens in sorted(contexts):
            plans.append(policy.decide(shown))
        num_stretches = sum(1 for _ in groupby(plans))
        return None if num_stretches == len(set(plans)) else "returns to a graph that it left as contexts grew"

    return _first_broken("unbroken", policy, broken, num_views)


def clockless(policy: Policy, num_views: int = NUM_VIEWS) -> list[str]:
    """Imports outside `PURE_MODULES` in the policy's module, and clocks read or numbers drawn while it decides."""
    kind = _kind(policy)
    found = [f"imports {name}, which a decision has no use for" for name in _impure_imports(type(policy))]
    with _watching() as calls:
        for number in range(num_views):
            policy.decide(kind.drawn_view(number))
    found += [f"calls {name}" for name in sorted(set(calls))]
    return [f"clockless: {type(policy).__qualname__} {sentence}" for sentence in found]


def hash_free(policy: Policy, num_views: int = NUM_VIEWS) -> list[str]:
    """Sets and dicts whose order reaches the plan: decided in two processes that hash strings differently."""
    cls = type(policy)
    name = f"{cls.__module__}:{cls.__qualname__}"
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        return [f"hash-free: {name} cannot be checked, no other process can import it; put it into a module"]
    command = [sys.executable, "-m", __name__, name, json.dumps(values_of(policy)), str(num_views)]
    path = os.pathsep.join(p or os.curdir for p in sys.path)
    plans = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return [f"hash-free: {name} fails in a process of its own: {done.stderr.strip().splitlines()[-1]}"]
        plans.add(done.stdout)
    return [f"hash-free: {name} plans otherwise under another PYTHONHASHSEED"] if len(plans) > 1 else []


def live(policy: BatchPolicy, num_workloads: int = NUM_WORKLOADS) -> list[str]:
    """Starvation and thrashing: small random workloads on the real scheduler, where every step lasts 1 us."""
    for number in range(num_workloads):
        config, workload = drawn_scene(number)
        # Twenty times what a machine that does one token a step and never recomputes would need.
        most = 20 * sum(r.prompt.num_tokens + r.output_tokens for r in workload.requests)
        try:
            served = _served(policy, config, workload, most)
        except PolicyError as error:
            return [f"live: workload {number}: {error}"]
        if served is None:
            return [f"live: workload {number} of {len(workload.requests)} requests is not served in {most} steps"]
    return []


def holds(policy: BatchPolicy, num_workloads: int = NUM_WORKLOADS) -> list[str]:
    """Plans that outlive their reasons: requests grow, blocks fill and time passes while a plan holds.

    A run that the policy does not bring to its end is not judged; `live` has done so.
    """
    for number in range(num_workloads):
        config, workload = drawn_scene(number)
        for step_us in _STEPS_US:
            try:
                stepped = _served(policy, config, workload, _MOST_STEPS, step_us=step_us)
            except PolicyError:
                continue
            if stepped is None:
                continue
            where = f"holds: workload {number}, steps of {step_us} us:"
            try:
                skipped = _served(policy, config, workload, _MOST_STEPS, step_us=step_us, skips=True)
            except PolicyError as error:
                return [f"{where} skipping the steps for which its plans hold, {error}"]
            if skipped != stepped:
                return [f"{where} {_first_difference(stepped, skipped)}"]
    return []


def _kind(policy: Policy) -> Kind:
    if policy.decides not in KINDS:
        raise ConfigError(f"{type(policy).__qualname__} decides {policy.decides!r}, accepted: {', '.join(KINDS)}")
    return KINDS[policy.decides]


def _first_broken(law: str, policy: Policy, broken: Callable[[Any], str | None], num_views: int) -> list[str]:
    """One sentence is enough to mend a policy; the same flaw usually shows in half of all views."""
    for number in range(num_views):
        if (sentence := broken(_kind(policy).drawn_view(number))) is not None:
            return [f"{law}: view {number}: {sentence}"]
    return []


def _impure_imports(cls: type[Any]) -> list[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(_source(cls))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Attribute) and node.attr == "random":
            names.add(ast.unparse(node))  # np.random needs no import of its own
    return sorted(n for n in names if n.split(".")[0] not in PURE_MODULES and not n.startswith(PURE_PACKAGES))


def _source(cls: type[Any]) -> str:
    """Of the policy's module. What a notebook or a script imports for itself is not the policy's."""
    if cls.__module__ != "__main__":
        return inspect.getsource(importlib.import_module(cls.__module__))
    try:
        return textwrap.dedent(inspect.getsource(cls))
    except OSError:  # a notebook is no file, but functions know their cell; those that dataclass made are of none
        cell = cls.decide.__code__.co_filename
        functions = [inspect.unwrap(f) for f in vars(cls).values() if inspect.isfunction(f)]
        written = [f for f in functions if f.__code__.co_filename == cell]
        return "\n".join(textwrap.dedent(inspect.getsource(f)) for f in written)


@contextlib.contextmanager
def _watching() -> Iterator[list[str]]:
    """Names of the clocks and dice that this thread uses meanwhile."""
    me, calls = threading.get_ident(), list[str]()

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == me:
                calls.append(name)
            return real(*args, **kwargs)

        return call

    watches = [(time, name) for name in _CLOCKS] + [(random, name) for name in _DICE]
    real = [getattr(module, name) for module, name in watches]
    try:
        for (module, name), function in zip(watches, real, strict=True):
            setattr(module, name, watched(f"{module.__name__}.{name}", function))
        yield calls
    finally:
        for (module, name), function in zip(watches, real, strict=True):
            setattr(module, name, function)


def _served(
    policy: BatchPolicy, config: InstanceConfig, workload: Workload, most: int, *, step_us: int = 1, skips: bool = False
) -> Records | None:
    """The records when all is served; None if that takes more than `most` steps.

    Args:
        skips: run a step and its repeats in one go, up to the end of the one into which the next event falls.
    """
    records, feed = Records(), WorkloadFeed(workload)
    scheduler = Scheduler(config, policy, records, step_time=STEP_TIME)
    conversation = serve(scheduler, feed, lambda r: prompt_token_ids(r, vocab_size=1000, seed=0))
    num_steps = 0
    command = next(conversation, None)
    while command is not None:
        answer: Woke | Completion
        if isinstance(command, Idle):
            assert command.until_us is not None, "a workload says when its next request comes"
            answer = Woke(command.until_us)
        else:
            last_us = command.start_us + (command.num_repeats * skips + 1) * step_us
            if feed.next_us is not None:
                last_us = min(last_us, max(feed.next_us + step_us - 1, command.start_us + step_us))
            answer = Completion(range(command.start_us + step_us, last_us + 1, step_us), None)
            num_steps += len(answer.ends_us)
        if num_steps > most:
            return None
        try:
            command = conversation.send(answer)
        except StopIteration:
            break
    return records.sort()


def _first_difference(stepped: Records, skipped: Records | None) -> str:
    for one, other in zip_longest(stepped.steps, skipped.steps if skipped is not None else []):
        if one != other:
            return f"step by step {_told(one)}; skipping the steps for which its plans hold, {_told(other)}"
    return "skipping the steps for which its plans hold leaves other records of requests"


def _told(step: StepRecord | None) -> str:
    if step is None:
        return "nothing more is run"
    tokens = dict(zip(step.ids, step.num_tokens, strict=True))
    return f"step {step.step} ({step.reason}) computes {tokens}, {step.num_waiting} wait"


def _answers_of(name: str, values: str, num_views: str) -> list[Any]:
    module, _, qualname = name.partition(":")
    cls: Any = importlib.import_module(module)
    for part in qualname.split("."):
        cls = getattr(cls, part)
    policy = configured(cls, json.loads(values))
    kind = _kind(policy)
    views = map(kind.drawn_view, range(int(num_views)))
    return [kind.answer(view, policy.decide(view)) for view in views]


if __name__ == "__main__":
    sys.stdout.write(f"{_answers_of(*sys.argv[1:])}\n")

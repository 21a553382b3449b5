"""The rules of the house that a reader could break without noticing: who imports whom, names, docstrings, types."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import xllm_lab

PACKAGE = Path(xllm_lab.__file__).parent
ROOT = PACKAGE.parent
HARDWARE_LIBRARIES = ("torch_npu", "acl", "mindspore")
# Above everything: what a person types and reads.
SURFACE = tuple(
    f"xllm_lab.{name}" for name in ("cli", "verbs", "report", "timeline_file", "text", "demo", "acceptance", "__main__")
)
HOSTS = ("xllm_lab.engine", "xllm_lab.sim", "xllm_lab.tuning")
FORBIDDEN_NAMES = {"utils", "util", "common", "base", "manager", "helper", "helpers", "misc"}


class Import(NamedTuple):
    """`importer` names `imported`, in one of its functions or as it is read."""

    importer: str
    imported: str
    in_function: bool


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__" and len(parts) > 2
        found[".".join(parts[:-1] if is_package else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports() -> tuple[Import, ...]:
    """Every import in the package, those for the type checker alone included."""
    return tuple(found for module in modules() for found in _imports(module, tree(module), False))


def _imports(module: str, node: ast.AST, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(module, alias.name, in_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module} imports by a relative name"
            for alias in child.names:
                submodule = f"{child.module}.{alias.name}"
                yield Import(module, submodule if submodule in modules() else child.module or "", in_function)
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(module, child, inside)


def is_within(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


def told(broken: list[Import]) -> str:
    return "; ".join(sorted({f"{i.importer} imports {i.imported}" for i in broken}))


def test_imports_are_seen_wherever_they_stand() -> None:
    """At the top, in a function, of a submodule: or the rules below would hold for want of imports."""
    assert Import("xllm_lab.sim.instance", "simpy", in_function=False) in imports()
    assert Import("xllm_lab.step_time", "scipy.optimize", in_function=True) in imports()
    assert Import("xllm_lab.runs", "xllm_lab.provenance", in_function=False) in imports()


@pytest.mark.parametrize(
    ("layer", "forbidden"),
    [
        ("xllm_lab.engine", ("xllm_lab.sim", "xllm_lab.tuning", "simpy", "optuna", *SURFACE)),
        ("xllm_lab.sim", ("xllm_lab.engine", "xllm_lab.tuning", "torch", "transformers", "optuna", *SURFACE)),
        ("xllm_lab.tuning", SURFACE),
        ("xllm_lab.formats", (*HOSTS, *SURFACE, "torch", "simpy", "optuna")),
        ("xllm_lab.profiles", (*HOSTS, *SURFACE, "torch", "simpy", "optuna")),
    ],
)
def test_a_layer_imports_nothing_beside_or_above_it(layer: str, forbidden: tuple[str, ...]) -> None:
    """Engine and simulator meet in the scheduler only, and either runs without the other's libraries."""
    broken = [i for i in imports() if is_within(i.importer, layer) and is_within(i.imported, *forbidden)]
    assert not broken, told(broken)


def test_shared_modules_know_no_host() -> None:
    """What both hosts use must not pull either in."""
    above = (*HOSTS, *SURFACE, "torch", "simpy", "optuna")
    upstairs = ("xllm_lab.__init__", *HOSTS, *SURFACE)  # the package's own face shows the surface's verbs
    broken = [i for i in imports() if not is_within(i.importer, *upstairs) and is_within(i.imported, *above)]
    assert not broken, told(broken)


def test_policies_import_the_standard_library_and_one_another() -> None:
    """And numpy, and the error tree. `contract` is stricter still with each policy's own module."""
    allowed = (*sys.stdlib_module_names, "numpy", "xllm_lab.errors", "xllm_lab.policies")
    broken = [
        i for i in imports() if is_within(i.importer, "xllm_lab.policies") and not is_within(i.imported, *allowed)
    ]
    assert not broken, told(broken)


def test_hardware_libraries_are_imported_where_devices_are_known() -> None:
    """In `engine.device` and `engine.ops`, inside the function that needs them: no other machine has them."""
    hardware = [i for i in imports() if is_within(i.imported, *HARDWARE_LIBRARIES)]
    at_home = ("xllm_lab.engine.device", "xllm_lab.engine.ops")
    broken = [i for i in hardware if not is_within(i.importer, *at_home) or not i.in_function]
    assert not broken, told(broken)


def test_triton_is_imported_when_its_kernels_are_wanted() -> None:
    """Where it is absent, everything but the kernels can be imported."""
    kernels = ("xllm_lab.engine.ops.gpu.attention", "xllm_lab.engine.ops.gpu.rowwise")
    assert {i.importer for i in imports() if is_within(i.imported, "triton")} == set(kernels)
    broken = [i for i in imports() if is_within(i.imported, *kernels) and not i.in_function]
    assert not broken, told(broken)


DEVICE_TYPES = ("cuda", "npu", "hccl", "nccl")
DEVICE_HOMES = ("xllm_lab.engine.device", "xllm_lab.engine.ops")


def named_devices(module: str) -> Iterator[str]:
    """Device types as strings ("cuda", "npu:0"), attributes (`torch.npu`, `x.cuda()`) or imports."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] in DEVICE_TYPES:
            yield f"{module}:{node.lineno} {node.value!r}"
        elif isinstance(node, ast.Attribute) and node.attr in DEVICE_TYPES:
            yield f"{module}:{node.lineno} .{node.attr}"
    for found in imports():
        if found.importer == module and is_within(found.imported, "torch.cuda", "torch.npu", "xllm_lab.engine.ops.npu"):
            yield f"{module} imports {found.imported}"


def test_device_types_are_named_where_devices_are_known() -> None:
    """Whatever else computes is told where, so that a new kind of device is a change in two places."""
    assert {"xllm_lab.engine.device", "xllm_lab.engine.ops.table"} <= {m for m in modules() if any(named_devices(m))}
    elsewhere = [m for m in modules() if not is_within(m, *DEVICE_HOMES, "xllm_lab.cli")]  # a word of its own is "npu"
    broken = [found for module in elsewhere for found in named_devices(module)]
    assert not broken, "; ".join(broken)


def test_nobody_imports_the_command() -> None:
    """It parses, calls and prints; whatever else is worth calling lives elsewhere."""
    own = ("xllm_lab.cli", "xllm_lab.__main__")
    broken = [i for i in imports() if is_within(i.imported, *own) and not is_within(i.importer, *own)]
    assert not broken, told(broken)


def test_modules_are_named_after_an_idea() -> None:
    """A name that fits everything says nothing."""
    assert not [m for m in modules() if FORBIDDEN_NAMES & set(m.split("."))]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("xllm_lab.sim.simulator", ("torch", "transformers", "optuna", "xllm_lab.engine")),
        ("xllm_lab.contract", ("torch", "simpy", "optuna")),
        ("xllm_lab.engine.engine", ("simpy", "optuna", "torch_npu", "xllm_lab.sim")),
    ],
)
def test_importing_a_host_brings_only_its_own_libraries(module: str, absent: tuple[str, ...]) -> None:
    """As seen by a fresh process, whatever its imports import."""
    program = f"import {module}, sys; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public_definitions() -> Iterator[tuple[str, Definition]]:
    """Public classes and functions of public modules, with their full names; the command's describe its options."""
    for module in modules():
        if is_within(module, "xllm_lab.cli") or any(part.startswith("_") for part in module.split(".")):
            continue
        for node in tree(module).body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                yield f"{module}.{node.name}", node


def says_it_all(node: Definition) -> bool:
    """A function of one statement, or a protocol: its name and types are its description."""
    if isinstance(node, ast.ClassDef):
        return any(isinstance(b, ast.Name) and b.id == "Protocol" for b in node.bases)
    return len(node.body) == 1


def test_public_names_are_described() -> None:
    """Every module, and every public class and function whose name and one statement do not say it all."""
    bare = [name for name, node in public_definitions() if not ast.get_docstring(node) and not says_it_all(node)]
    bare += [m for m in modules() if tree(m).body and not ast.get_docstring(tree(m))]
    assert not bare, f"without a docstring: {', '.join(bare)}"


def test_descriptions_begin_with_a_sentence() -> None:
    """The first paragraph stands alone, and ends like one."""
    texts = {name: ast.get_docstring(node) for name, node in public_definitions()}
    texts |= {m: ast.get_docstring(tree(m)) for m in modules()}
    broken = [
        name for name, text in texts.items() if text and not text.split("\n\n")[0].rstrip().endswith((".", ":", "?"))
    ]
    assert not broken, f"does not begin with a sentence: {', '.join(broken)}"


def test_the_house_is_swept() -> None:
    """`ruff check` finds nothing, in package and tests."""
    command = [sys.executable, "-m", "ruff", "check", "xllm_lab", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_types_are_sound() -> None:
    """`mypy --strict` finds nothing, in package and tests."""
    command = [sys.executable, "-m", "mypy", "--strict", "xllm_lab", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout

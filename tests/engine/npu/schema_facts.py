"""Argument names, kinds and defaults of the operators that we call, as a wheel of torch_npu registers them.

    pip download --no-deps torch_npu==2.13.0
    python -m tests.engine.npu.schema_facts torch_npu-2.13.0-*.whl      writes facts/torch_npu-2.13.0.json

They are read from the strings of the wheel's library. Its YAML files hold what the library is generated from, which
differs: there, `npu_rms_norm` has an argument `self`, and the results of `.out` are two arguments instead of a list.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

from xllm_lab.engine.ops.npu import calls  # noqa: F401  (declares the operators)
from xllm_lab.engine.ops.npu.operators import OPERATORS

FOLDER = Path(__file__).parent / "facts"
VERSIONS = ("2.10.0.post4", "2.13.0")
LIBRARY = "torch_npu/lib/libtorch_npu.so"
Facts = dict[str, dict[str, Any]]


def read_facts(version: str) -> Facts:
    """Operator -> {"arguments": [[name, type, kind, default]], "returns"}; default is null where there is none."""
    operators: Facts = json.loads((FOLDER / f"torch_npu-{version}.json").read_text(encoding="utf-8"))["operators"]
    return operators


def schema(name: str, facts: dict[str, Any]) -> str:
    """The schema again, for `torch.library`."""
    parts: list[str] = []
    for argument, type, kind, default in facts["arguments"]:
        if kind == "keyword" and "*" not in parts:
            parts.append("*")
        parts.append(f"{type} {argument}" + ("" if default is None else f"={default}"))
    return f"{name}({', '.join(parts)}) -> {facts['returns']}"


def facts_of(found: str) -> dict[str, Any]:
    """Take one schema apart."""
    inside, returns = re.fullmatch(r"[\w.]+\((.*)\) -> (.*)", found).groups()  # type: ignore[union-attr]
    kind, arguments = "positional", []
    for part in inside.split(", "):
        if part == "*":
            kind = "keyword"
            continue
        type, _, rest = part.partition(" ")
        name, _, default = rest.partition("=")
        arguments.append([name, type, kind, default or None])
    return {"arguments": arguments, "returns": returns}


def facts_of_wheel(wheel: Path) -> Facts:
    """Of every operator that we declare; KeyError for one that the wheel does not have."""
    library = zipfile.ZipFile(wheel).read(LIBRARY)
    found: dict[str, str] = {}
    for match in re.finditer(rb"(?<![\w.:])(_?npu_[\w.]+)\([^\0]*\) -> [^\0]*(?=\0)", library):
        found[match[1].decode()] = match[0].decode()
    return {name: facts_of(found[name]) for name in sorted(OPERATORS)}


def main() -> None:
    """Write the facts of each wheel that is named."""
    for wheel in map(Path, sys.argv[1:]):
        version = wheel.name.split("-")[1]
        operators = ",\n".join(
            f'  {json.dumps(name)}: {{\n    "returns": {json.dumps(facts["returns"])},\n    "arguments": [\n'
            + ",\n".join(f"      {json.dumps(argument)}" for argument in facts["arguments"])
            + "\n    ]\n  }"
            for name, facts in facts_of_wheel(wheel).items()
        )
        text = f'{{"torch_npu": {json.dumps(version)}, "operators": {{\n{operators}\n}}}}\n'
        (FOLDER / f"torch_npu-{version}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

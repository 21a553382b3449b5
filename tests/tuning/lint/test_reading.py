"""Files are told apart, their settings found with their lines, and whatever is none of them is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tuning.lint.configurations import situations, texts
from xllm_lab.errors import ConfigError
from xllm_lab.tuning.lint.configuration import Form, Kind
from xllm_lab.tuning.lint.linter import lint, repair
from xllm_lab.tuning.lint.reading import parse_configuration, read_configuration
from xllm_lab.tuning.lint.settings import Situation

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)


PACKED = {"additional_config": {"refresh": True}, "additional_config.refresh": True}
READ = {
    "json": (
        '{"block_size": 64,\n "enable_graph": true}',
        (Kind.XLLM, Form.JSON),
        {"block_size": 64, "enable_graph": True},
        [1, 2],
    ),
    "flagfile": (
        "# mine\n--block_size=64\n-enable-graph\n",
        (Kind.XLLM, Form.FLAGFILE),
        {"block_size": "64", "enable_graph": "true"},
        [2, 3],
    ),
    "command": (
        "A=1\nxllm --block_size 64 \\\n  --noenable_graph > 'log file' 2>&1 &\ndone\n",
        (Kind.XLLM, Form.COMMAND),
        {"block_size": "64", "enable_graph": "false"},
        [2, 3],
    ),
    "script": (
        'for ((i = 0; i < 2; i++)); do\n  /bin/xllm --nnodes="${N}" # --port=1\ndone',
        (Kind.XLLM, Form.COMMAND),
        {"nnodes": "${N}"},
        [2],
    ),
    "packed yaml": (
        "max-num-seqs: 64\nadditional-config: '{\"refresh\": true}'\n",
        (Kind.VLLM, Form.YAML),
        {"max_num_seqs": 64, **PACKED},
        [1, 2, 2],
    ),
    "yaml": (
        "max_num_seqs: 64\nadditional_config:\n  refresh: true\n",
        (Kind.VLLM, Form.YAML),
        {"max_num_seqs": 64, **PACKED},
        [1, 2, 3],
    ),
    "vllm serve": (
        "vllm serve m --max-num-seqs 64 --no-enable-dbo --additional-config '{\"refresh\": true}'",
        (Kind.VLLM, Form.COMMAND),
        {"max_num_seqs": 64, "enable_dbo": False, **PACKED},
        [1, 1, 1, 1],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_for_what_it_is(name: str) -> None:
    """Kind, form, values and lines."""
    text, what, values, lines = READ[name]
    config = parse_configuration(text, "it")
    assert (config.kind, config.form) == what
    assert {name: entry.value for name, entry in config.entries.items()} == values
    assert [entry.line for entry in config.entries.values()] == lines


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"block_size": 64,}', r"it:1: .*xLLM would log that and start with its defaults"),
        ("block_size: 64\nenable_graph: true\n", "xLLM's flags as YAML, which xLLM does not read"),
        ("good morning", "it: holds no settings; accepted: the JSON"),
        ("xllm --port=1\nxllm --port=2\n", "holds 2 command lines, on lines 1, 2; one is accepted"),
        ("[" * 100_000, "it: "),
        ('{"a": ' * 100_000, "it: cannot be read as JSON"),
        ("&a\nmax_num_seqs: 1\nx: *a\n", "nested more than 32 deep, or refers to itself"),
        ("".join(f"--x{k}=1\n" for k in range(3000)), "holds 3000 settings; at most 2000"),
    ],
)
def test_what_is_none_is_refused(text: str, says: str) -> None:
    """With what is accepted, or the line at fault."""
    with pytest.raises(ConfigError, match=says):
        parse_configuration(text, "it")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00--port=1"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """Not there, or no text."""
    path = tmp_path / "it"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="no configuration can be read there"):
        read_configuration(path)


def judged(text: str, known: Situation) -> None:
    """As the command does it: a refusal of one line, or findings of one line each."""
    try:
        found = lint(parse_configuration(text, "it"), known)
    except ConfigError:
        return
    after = repair(found)
    assert all("\n" not in one.says for one in (*found.findings, *after.findings))


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), PLAIN.map(json.dumps), st.text(alphabet="-=ab_:{}[]\"'\\$ \n#&|<>*!%@,0")), situations())
def test_nothing_that_is_text_crashes(text: str, known: Situation) -> None:
    """Any text, any JSON, and texts that look like flags or YAML."""
    judged(text, known)


@settings(max_examples=150, deadline=None)
@given(texts(), situations())
def test_no_configuration_crashes(text: str, known: Situation) -> None:
    """Whatever its values, in any version, with any model on any device."""
    judged(text, known)

"""The tables of flags and options: what is in them, and that it is right about itself."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tuning.lint.configurations import valid
from xllm_lab.errors import ConfigError
from xllm_lab.tuning.lint.flag_table import (
    BOUNDS_FILE,
    FLAGS_FILE,
    LATEST,
    VERSIONS,
    every_name,
    refuse_unsayable,
    version_named,
    versions_with,
    xllm_flags,
)
from xllm_lab.tuning.lint.vllm_table import vllm_options
from xllm_lab.tuning.lint.xllm_source import definitions, rows, write

VERSION_NAMES = [version.name for version in VERSIONS]
SOURCE = """// DEFINE_bool(no_flag, true, "of ours");
DEFINE_bool(enable_tea,
            true,
            "Whether to make tea.");
  DEFINE_int32(num_cups, -1, "Cups, -1 for all.");
DEFINE_string(kind, "green", "Kind of tea.");
DEFINE_int32(most_ms, std::numeric_limits<int32_t>::max(), "Budget.");
void TeaConfig::from_json(const JsonReader& json) {
  XLLM_CONFIG_ASSIGN_FROM_JSON(enable_tea);
  // XLLM_CONFIG_ASSIGN_FROM_JSON(kind);
}
"""


@pytest.mark.parametrize("version", VERSION_NAMES)
def test_a_flag_accepts_its_own_default(version: str) -> None:
    """And every value in the table has the flag's type."""
    flags = xllm_flags(version)
    assert len(flags) > 90
    for flag in flags.values():
        if flag.default is not None:
            assert flag.is_of_type(flag.default), flag
            assert flag.is_within(flag.default), flag
        assert flag.accepted
        assert f"@{version_named(version).commit} xllm/core/" in flag.source


def test_bounds_are_about_flags() -> None:
    """Every row names a flag and a source."""
    for line in BOUNDS_FILE.read_text(encoding="utf-8").splitlines()[1:]:
        name, *_, source = line.split(",")
        assert name in every_name()
        assert source.startswith("xllm@")


@pytest.mark.parametrize(
    ("name", "default", "source", "in_json"),
    [
        ("max_seqs_per_batch", 200, "scheduler_config.cpp:23", True),
        ("acl_graph_decode_batch_size_limit", 16, "execution_config.cpp:64", True),
        ("max_memory_utilization", 0.8, "kv_cache_config.cpp:32", True),
        ("max_global_tpot_ms", 2**31 - 1, "profile_config.cpp:43", True),
        ("priority_strategy", "fcfs", "scheduler_config.cpp:57", True),
        ("instance_role", "DEFAULT", "disagg_pd_config.cpp:38", False),
    ],
)
def test_flags_as_they_are_defined(name: str, default: object, source: str, in_json: bool) -> None:
    """At 3906f5a91, against what was read there by eye."""
    flag = xllm_flags(LATEST)[name]
    assert (flag.default, flag.is_in_json) == (default, in_json)
    assert flag.source.endswith(source)


def test_flags_come_and_go() -> None:
    """Versions in which a name exists."""
    assert versions_with("enable_acl_graph") == ["0.7.0", "0.7.2"]
    assert versions_with("enable_mix_batch") == [LATEST]
    assert xllm_flags("87e8d6ed6")["max_seqs_per_batch"].default == 1024
    assert "config_json_file" not in xllm_flags("0.9.1")


@pytest.mark.parametrize(
    ("said", "name"), [("v0.9.0", "0.9.0"), ("3906f5a", "3906f5a91"), ("87e8d6ed619bfbf9", "87e8d6ed6")]
)
def test_versions_have_several_names(said: str, name: str) -> None:
    """A release with or without v, a commit in any length."""
    assert version_named(said).name == name


@pytest.mark.parametrize("said", ["", "1.0", "3906", "main"])
def test_an_unknown_version_is_refused(said: str) -> None:
    """With those there are."""
    with pytest.raises(ConfigError, match=r"no flags of xLLM .* are known; accepted: 0\.7\.0, "):
        version_named(said)


@given(st.data())
def test_what_is_sayable_is_not_refused(data: st.DataObject) -> None:
    """And what is out of bounds, of another type, or unknown is."""
    flag = xllm_flags()[data.draw(st.sampled_from(sorted(xllm_flags())))]
    refuse_unsayable({flag.name: data.draw(valid(flag))})
    with pytest.raises(ConfigError, match=f"^{flag.name} is "):
        refuse_unsayable({flag.name: [1]})
    with pytest.raises(ConfigError, match=r"^colour is no flag of xLLM 3906f5a91"):
        refuse_unsayable({"colour": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_memory_utilization", 1.5), ("block_size", 0), ("priority_strategy", "lifo"), ("enable_graph", 1)],
)
def test_what_is_out_of_bounds_is_refused(name: str, value: object) -> None:
    """With what is accepted, and where the flag is defined."""
    with pytest.raises(ConfigError, match=rf"^{name} is .*; xLLM 3906f5a91 accepts .* \(xllm@3906f5a91 "):
        refuse_unsayable({name: value})


def test_source_is_read_as_a_compiler_would() -> None:
    """Names, types, defaults, lines; and what the JSON file may hold, which a comment does not."""
    found = list(definitions(SOURCE, "xllm/core/framework/config/tea_config.cpp"))
    told = [(one.name, one.type, one.default, one.line, one.is_in_json) for one in found]
    assert told == [
        ("enable_tea", "bool", "true", 2, True),
        ("num_cups", "int32", "-1", 5, False),
        ("kind", "string", "green", 6, False),
        ("most_ms", "int32", "2147483647", 7, False),
    ]


def test_a_changed_default_is_a_row_of_its_own() -> None:
    """Versions that agree share one; the file begins with the columns of the committed one."""
    first = {one.name: one for one in definitions(SOURCE, "xllm/core/framework/config/tea_config.cpp")}
    later = {**first, "num_cups": first["num_cups"]._replace(default="4", line=9)}
    table = rows([("0.10.0", first), (LATEST, first), ("0.10.1", later)])
    cups = [row for row in table if row["name"] == "num_cups"]
    assert [(row["default"], row.get("0.10.0"), row.get("0.10.1")) for row in cups] == [
        ("-1", "tea:5 cli", None),
        ("4", None, "tea:9 cli"),
    ]
    file = io.StringIO()
    write(file, table)
    assert file.getvalue().splitlines()[0] == FLAGS_FILE.read_text(encoding="utf-8").splitlines()[0]


def test_options_accept_their_own_defaults() -> None:
    """Of vLLM-Ascend's additional_config, each with its source."""
    for option in vllm_options().values():
        assert option.is_of_type(option.default), option
        assert option.is_within(option.default), option
        assert option.source.startswith(("vllm-ascend@182b75ea ", "vllm@"))
        assert option.accepted

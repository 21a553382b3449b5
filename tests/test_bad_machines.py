"""What can be wrong with a machine or a fleet that is to be simulated: one line, exit status 2, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.report_inputs import CONFIG, POLICY, calibration, workload
from tests.sim.cost.profile_bundles import write_bundle
from tests.test_bad_input import NOT_THERE, Words, refused
from xllm_lab.formats import own
from xllm_lab.hardware import BUILT_IN
from xllm_lab.policies.of_instance import Policies
from xllm_lab.sim.calibrate import write_calibration
from xllm_lab.sim.machine import fitted_machine
from xllm_lab.sim.simulator import simulate

ROOFLINE = ("--hardware", "ascend-910c", "--model-config", "qwen2.5-7b")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trace, a calibration, a bundle of operators and a run; all of them good."""
    folder = tmp_path_factory.mktemp("inputs")
    own.write(workload(), folder / "trace.jsonl")
    write_calibration(calibration(), folder / "machine.json")
    write_bundle(folder / "bundle")
    simulate(workload(), CONFIG, Policies(POLICY), fitted_machine(calibration()), out=folder / "run")
    return folder


@dataclass(frozen=True)
class Case:
    """Options of `simulate` besides the trace, from the folder of inputs and an empty one, and what is said of them."""

    words: Callable[[Path, Path], Words]
    says: tuple[str, ...]


def plain(*words: str) -> Callable[[Path, Path], Words]:
    return lambda inputs, folder: words


def calibrated(*words: str) -> Callable[[Path, Path], Words]:
    return lambda inputs, folder: (*words, "--calibration", inputs / "machine.json")


def profiled(*words: str) -> Callable[[Path, Path], Words]:
    return lambda inputs, folder: (*words, "--profile", inputs / "bundle")


def spoilt(table: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path, Path], Words]:
    """A bundle with other lines in one of its files."""

    def words(inputs: Path, folder: Path) -> Words:
        path = write_bundle(folder / "bundle") / table
        path.write_text("\n".join(change(path.read_text(encoding="utf-8").splitlines())) + "\n", encoding="utf-8")
        return ("--profile", folder / "bundle")

    return words


def lacking(*operators: str) -> Callable[[Path, Path], Words]:
    return lambda inputs, folder: ("--profile", write_bundle(folder / "bundle", without=operators))


def no_attention(inputs: Path, folder: Path) -> Words:
    bundle = write_bundle(folder / "bundle")
    (bundle / "tp1" / "attention.csv").unlink()
    return ("--profile", bundle)


def without_rows(start: str) -> Callable[[list[str]], list[str]]:
    def change(lines: list[str]) -> list[str]:
        kept = [line for line in lines if not line.startswith(start)]
        assert len(kept) < len(lines), start
        return kept

    return change


def second_row(row: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [lines[0], row, *lines[2:]]


def a_device(change: Callable[[str], str]) -> Callable[[Path, Path], Words]:
    """A file of one device, the first of the built-in ones, after a change."""

    def words(inputs: Path, folder: Path) -> Words:
        path = folder / "mine.toml"
        tables = BUILT_IN.read_text(encoding="utf-8").split("\n[ascend-910b1]")[0]
        changed = change(tables)
        assert changed != tables
        path.write_text(changed, encoding="utf-8")
        return ("--hardware", path, "--model-config", "qwen2.5-7b")

    return words


def line_without(start: str, after: str = "") -> Callable[[str], str]:
    """Lacks the line that starts so, the first one `after`."""

    def change(text: str) -> str:
        head, mark, tail = text.partition(after) if after else ("", "", text)
        lines = tail.splitlines(keepends=True)
        k = next(k for k, line in enumerate(lines) if line.startswith(start))
        return head + mark + "".join(lines[:k] + lines[k + 1 :])

    return change


def a_cluster(text: str) -> Callable[[Path, Path], Words]:
    def words(inputs: Path, folder: Path) -> Words:
        path = folder / "cluster.toml"
        path.write_text(text, encoding="utf-8")
        return (*ROOFLINE, "--cluster", path)

    return words


CASES: dict[str, Case] = {
    # Which machine.
    "no machine": Case(plain(), ("no machine", "--calibration", "--profile", "--hardware")),
    "unknown hardware": Case(
        plain("--hardware", "ascend-999", "--model-config", "qwen2.5-7b"), ("'ascend-999'", "ascend-910c", ".toml")
    ),
    "more KV than memory": Case(
        plain(*ROOFLINE, "--set", "num_kv_blocks=100000"), ("num_kv_blocks is 100000", "room for", "tokens")
    ),
    "more context than the model": Case(
        plain(*ROOFLINE, "--set", "max_model_len=1000000"), ("max_model_len is 1000000", "Qwen2.5-7B", "accepts")
    ),
    "hardware without a model": Case(plain("--hardware", "ascend-910c"), ("--hardware needs a model", "config.json")),
    "unknown model": Case(
        plain("--hardware", "ascend-910c", "--model-config", "gpt-9"), ("'gpt-9'", "qwen2.5-7b", "config.json")
    ),
    "no model file": Case(
        plain("--hardware", "ascend-910c", "--model-config", "/not/there.json"), ("/not/there.json",)
    ),
    "no hardware file": Case(
        plain("--hardware", "/not/there.toml", "--model-config", "qwen2.5-7b"), ("/not/there.toml",)
    ),
    "a model that does not fit": Case(
        plain("--hardware", "ascend-910c", "--model-config", "llama-3.1-70b"),
        ("Llama-3.1-70B", "131.4 GiB", "ascend-910c", "more devices", "accepted"),
    ),
    "heads that do not divide": Case(
        plain(*ROOFLINE, "--tensor-parallel", "3"), ("tensor_parallel is 3", "28 attention heads", "accepted")
    ),
    "no devices": Case(plain(*ROOFLINE, "--tensor-parallel", "0"), ("tensor_parallel is 0", "at least 1")),
    "experts of a dense model": Case(
        plain(*ROOFLINE, "--expert-parallel", "2"), ("expert_parallel is 2", "no experts")
    ),
    "unknown precision": Case(plain(*ROOFLINE, "--precision", "int3"), ("'int3'", "bf16", "w8a8")),
    "precision of other hardware": Case(
        plain(*ROOFLINE, "--precision", "fp8"), ("ascend-910c has no matrix units for fp8", "bf16")
    ),
    "a host ahead of time": Case(plain(*ROOFLINE, "--host-us", "-1"), ("-1", "at least 0")),
    # Options that would have no effect.
    "two machines": Case(calibrated(*ROOFLINE), ("--hardware, --model-config beside --calibration",)),
    "a calibration of operators": Case(profiled("--calibration", "x.json"), ("--profile beside --calibration",)),
    "parallel beside a calibration": Case(
        calibrated("--tensor-parallel", "2"), ("--tensor-parallel beside --calibration", "one or the other")
    ),
    "host time beside a calibration": Case(calibrated("--host-us", "9"), ("--host-us beside --calibration",)),
    "graphs nobody measured": Case(
        calibrated("--shapes", "xllm-buckets"), ("shapes is 'xllm-buckets'", "no step calibrated on ran in a graph")
    ),
    "precision beside operators": Case(profiled("--precision", "w8a8"), ("--precision beside --profile",)),
    "a group without experts": Case(profiled("--data-parallel", "2"), ("data_parallel is 2", "share nothing")),
    "a group that shares nothing": Case(
        plain(*ROOFLINE, "--data-parallel", "2"), ("data_parallel is 2", "share nothing")
    ),
    "one of one": Case(plain(*ROOFLINE, "--alike"), ("one of alike instances", "data_parallel is 1")),
    "skew of a dense model": Case(plain(*ROOFLINE, "--expert-skew", "1"), ("has none",)),
    "skew and loads": Case(
        plain(*ROOFLINE, "--expert-skew", "1", "--expert-loads", "x.npz"), ("--expert-skew or --expert-loads",)
    ),
    "links of one device": Case(
        profiled("--hardware", "ascend-910c"), ("--hardware beside --profile", "--tensor-parallel")
    ),
    "a cluster and a number": Case(
        plain(*ROOFLINE, "--cluster", "x.toml", "--instances", "2"), ("--cluster or --instances", "one of them")
    ),
    # Operator profiles.
    "no bundle": Case(plain("--profile", str(NOT_THERE)), ("/not/there/meta.yaml", "accepted")),
    "a bundle without its model": Case(spoilt("meta.yaml", lambda lines: lines[1:]), ("meta.yaml", "'model'")),
    "operators of no such division": Case(profiled("--tensor-parallel", "4"), ("tp4", "the bundle has tp1")),
    "a missing operator": Case(lacking("down_proj"), ("dense.csv", "down_proj", "Llama-3.1-8B")),
    "a missing head": Case(lacking("lm_head"), ("per_sequence.csv", "lm_head")),
    "a missing file": Case(no_attention, ("attention.csv", "prefill_chunk")),
    "a hole among lengths": Case(
        spoilt("tp1/attention.csv", without_rows("0,0,4,64,")), ("attention.csv", "hole", "(0, 0, 4, 64)")
    ),
    "a hole among sizes": Case(
        spoilt("tp1/dense.csv", without_rows("o_proj,8,")), ("dense.csv", "o_proj has no row for 8 tokens")
    ),
    "times in seconds": Case(
        spoilt("tp1/dense.csv", second_row("embedding,1,3e-06")), ("dense.csv, line 2", "3e-06", "microseconds")
    ),
    "times in nanoseconds": Case(
        spoilt("tp1/dense.csv", second_row("embedding,1,3000000000")),
        ("dense.csv, line 2", "3000000000", "unit"),
    ),
    "a word for a time": Case(
        spoilt("tp1/attention.csv", second_row("0,0,1,16,soon")), ("attention.csv, line 2", "'soon'", "number")
    ),
    "a row twice": Case(
        spoilt("tp1/dense.csv", lambda lines: [*lines, lines[1]]), ("dense.csv, line", "embedding at 1 tokens", "twice")
    ),
    "other columns": Case(
        spoilt("tp1/dense.csv", lambda lines: ["layer,tokens,ms", *lines[1:]]), ("dense.csv, line 1", "time_us")
    ),
    # Hardware files.
    "a figure without a source": Case(
        a_device(line_without("hbm_bytes =", after=".sources]")), ("mine.toml", "hbm_bytes has no source", "expected")
    ),
    "a missing figure": Case(
        a_device(lambda text: line_without("launch_us")(line_without("launch_us", after=".sources]")(text))),
        ("mine.toml", "launch_us missing"),
    ),
    "gigabytes for bytes": Case(
        a_device(lambda text: text.replace("hbm_bytes = 68_719_476_736", "hbm_bytes = 64")),
        ("mine.toml", "hbm_bytes is 64", "can be right"),
    ),
    "teraflops for flops": Case(
        a_device(lambda text: text.replace("bf16 = 353.9e12", "bf16 = 353.9")), ("bf16 is 353.9", "can be right")
    ),
    "a link slower than a byte a second, of a device": Case(
        a_device(
            lambda text: text.replace("bytes_per_s = 196e9, latency_us = 0.5", "bytes_per_s = 0.5, latency_us = 0.5")
        ),
        ("mine.toml", "link.bytes_per_s is 0.5", "can be right"),
    ),
    # Cluster files.
    "no cluster file": Case(plain(*ROOFLINE, "--cluster", str(NOT_THERE)), ("/not/there", "cluster file")),
    "no instances": Case(
        a_cluster("[fleet]\nnum_instances = 0\n"), ("cluster.toml: [fleet] num_instances is 0", "1 to")
    ),
    "no instances on the command line": Case(plain(*ROOFLINE, "--instances", "0"), ("num_instances is 0", "1 to")),
    "a link slower than a byte a second": Case(
        a_cluster("[fleet]\nnum_instances = 2\n[link]\nbytes_per_s = 0\n"),
        ("cluster.toml: [link] bytes_per_s is 0", "at least 1"),
    ),
    "half a byte a second": Case(
        a_cluster("[fleet]\nnum_instances = 2\n[link]\nbytes_per_s = 0.5\n"), ("[link] bytes_per_s is 0.5", "integer")
    ),
    "an unknown router": Case(
        a_cluster('[fleet]\nnum_instances = 2\n[router]\npolicy = "oracle"\n'), ("'oracle'", "round-robin")
    ),
    "an outage of nobody": Case(
        a_cluster("[fleet]\nnum_instances = 2\n[[outage]]\ninstance = 2\nstart_us = 1\nend_us = 2\n"),
        ("cluster.toml", "instance"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line(name: str, inputs: Path, tmp_path: Path) -> None:
    """Status 2, one line that names the file, the row, the value and what is accepted; no run."""
    words = CASES[name].words(inputs, tmp_path)
    line: Words = ("simulate", inputs / "trace.jsonl", *words, "--out", tmp_path / "run")
    refused(line, CASES[name].says, keeps=tmp_path)


@pytest.mark.parametrize(
    "words",
    [("--requests", "4"), ("--rate-per-s", "2"), ("--ttft-slo-ms", "9"), ("--clients", "3"), ("--format", "azure")],
    ids=" ".join,
)
def test_a_run_to_be_like_has_its_requests(words: tuple[str, ...], inputs: Path, tmp_path: Path) -> None:
    """What would change a trace is refused beside `--like`, rather than forgotten."""
    line: Words = ("simulate", "--like", inputs / "run", *words, *ROOFLINE, "--out", tmp_path / "run")
    refused(line, (f"{words[0]} beside --like", "with a trace"), keeps=tmp_path)

"""Mistakes that the tests on the fake device have to find: each is made in a copy of the tree, where one test fails.

    python -m tests.npu.mutations            all of them, after the named tests have passed without any
    python -m tests.npu.mutations NAME...    some

Run it in the environment of `make test-npu`. The exit status is 1 if a mistake was not found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COPIED = ("xllm_lab", "tests")
OPS, DEVICE = "xllm_lab/engine/ops/npu/", "xllm_lab/engine/device/"
SERVING, BUDGETS = "tests/npu/test_npu_serving.py::", "tests/npu/test_npu_budgets.py::"
LENGTHS = SERVING + "test_lengths_change_between_replays"
EAGER = SERVING + "test_eager_steps_compute_what_the_cpu_computes"
GRAPHS = SERVING + "test_graphs_compute_what_eager_steps_compute"
SILENT = SERVING + "test_a_step_that_draws_nothing_is_done_before_the_next_is_written"
LIMITS = SERVING + "test_bfloat16_within_the_operators_limits"
DRAFTS, DRAFT_STREAM = "xllm_lab/engine/drafts/", "tests/npu/test_npu_draft_stream.py::"
ANY_ORDER = DRAFT_STREAM + "test_drafts_are_the_same_in_any_order"
LEFT_BEHIND = DRAFT_STREAM + "test_a_step_does_not_wait_for_the_draft_model"


class Mutation(NamedTuple):
    """A piece of a file, what stands there by mistake, and the test that finds it."""

    path: str
    right: str
    wrong: str
    found_by: str


MUTATIONS = {
    "no-reference": Mutation(
        "tests/npu/engines.py", "in OPERATORS.items()}", "in OPERATORS.items() if name != 'npu_swiglu'}", EAGER
    ),
    "no-wait-for-new-lengths": Mutation(DEVICE + "streams.py", "self._event.wait(stream)", "pass", LENGTHS),
    "event-never-cleared": Mutation(DEVICE + "streams.py", "self._event.reset(stream)", "pass", LENGTHS),
    "event-recorded-too-early": Mutation(
        DEVICE + "streams.py",
        "        self._api.graph_task_update_begin(stream, self._handle)\n",
        "        self._event.record(stream)\n        self._api.graph_task_update_begin(stream, self._handle)\n",
        LENGTHS,
    ),
    "event-never-recorded-first": Mutation(DEVICE + "streams.py", "self._event.record(updating)", "pass", LENGTHS),
    "no-update": Mutation(
        "xllm_lab/engine/graph_backends.py", "return run_updated if groups else run", "return run", LENGTHS
    ),
    "looks-at-a-number-while-captured": Mutation(
        OPS + "serving.py", "own.q_TNH.copy_(q_TNH)", "own.q_TNH.copy_(q_TNH).max().item()", LENGTHS
    ),
    "looks-at-a-number-in-each-step": Mutation(
        "xllm_lab/engine/graphs.py",
        "            graph.replay()\n",
        "            graph.replay()\n            graph.normed_TD[0, 0].item()\n",
        BUDGETS + "test_a_decoding_step",
    ),
    "copies-while-the-host-waits": Mutation(
        "xllm_lab/engine/graph_inputs.py", "non_blocking=True", "non_blocking=False", BUDGETS + "test_a_decoding_step"
    ),
    "allocates-in-each-step": Mutation(
        "xllm_lab/engine/graphs.py",
        "            graph.replay()\n",
        "            graph.replay()\n            self.__dict__.setdefault('kept', []).append("
        "graph.normed_TD.new_empty(2**22))\n",
        BUDGETS + "test_a_decoding_step",
    ),
    "queries-in-another-layout": Mutation(OPS + "calls.py", '"input_layout": "TND"', '"input_layout": "BSND"', EAGER),
    "cache-in-another-layout": Mutation(OPS + "calls.py", 'cache_mode="Norm"', 'cache_mode="PA_NZ"', EAGER),
    "a-mask-the-other-way-round": Mutation(OPS + "serving.py", ".triu_(1)", ".tril_(-1)", EAGER),
    "lengths-not-cumulated": Mutation(
        "xllm_lab/engine/ops/batch.py",
        "[*self.query_starts[1:], ",
        "[*(b - a for a, b in zip(self.query_starts, self.query_starts[1:])), ",
        EAGER,
    ),
    "strided-queries": Mutation(OPS + "serving.py", "_attend(q_TNH.contiguous(),", "_attend(q_TNH,", LIMITS),
    "padding-without-lengths": Mutation(
        "xllm_lab/engine/graph_inputs.py", "batch.num_padding = padding", "batch.num_padding = 0", LENGTHS
    ),
    "host-memory-reused-while-copied": Mutation(
        "xllm_lab/engine/runner.py", "            self._device.synchronize()", "            pass", SILENT
    ),
    "memory-of-a-captured-call-freed": Mutation(
        OPS + "serving.py", "self._captured[len(q_TNH)] = _Captured(", "own = _Captured(", GRAPHS
    ),
    "drafts-before-the-prompt-is-read": Mutation(
        DRAFTS + "draft_model.py",
        "        with self._beside():\n            return self._runner.run(chunks)",
        "        return self._runner.run(chunks)",
        ANY_ORDER,
    ),
    "prompts-read-when-drafts-are-asked-for": Mutation(
        DRAFTS + "draft_model.py",
        "None if device.is_host else self._fill",
        "None",
        DRAFT_STREAM + "test_prompts_are_read_by_the_time_drafts_are_asked_for",
    ),
    "looks-at-drafts-on-another-stream": Mutation(
        DRAFTS + "draft_model.py",
        "        with self._beside():\n            return self._ops.argmax(logits_RV)",
        "        return self._ops.argmax(logits_RV)",
        ANY_ORDER,
    ),
    "prompts-read-before-there-is-memory": Mutation(
        DRAFTS + "draft_model.py",
        "        with self._beside():\n            pool",
        "        with nullcontext():\n            pool",
        ANY_ORDER,
    ),
    "weights-read-before-they-are-there": Mutation(
        DEVICE + "streams.py",
        "stream.wait_stream(self.current())",
        "pass",
        DRAFT_STREAM + "test_what_was_loaded_is_there_before_it_is_read",
    ),
    "inputs-copied-on-the-targets-stream": Mutation(
        "xllm_lab/engine/ops/batch.py",
        '    return values if device.type == "cpu" else values.pin',
        "    with torch.npu.stream(torch.npu.default_stream()):\n"
        '        return values if device.type == "cpu" else values.pin',
        ANY_ORDER,
    ),
    "waits-for-copies": Mutation(
        "xllm_lab/engine/ops/batch.py",
        "values.pin_memory().to(device, non_blocking=True)",
        "values.to(device)",
        DRAFT_STREAM + "test_the_host_waits_no_more_often",
    ),
    "reads-prompts-on-the-targets-stream": Mutation(
        DRAFTS + "draft_model.py",
        "        with self._beside():\n            self._runner.fill(chunks)",
        "        self._runner.fill(chunks)",
        LEFT_BEHIND,
    ),
    "a-silent-step-waits-for-everybody": Mutation(
        DEVICE + "__init__.py", "self.streams.current().synchronize()", "torch.accelerator.synchronize()", LEFT_BEHIND
    ),
}


def run(tests: list[str], tree: Path) -> bool:
    """Whether these tests pass in a tree."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "tests.fake_cann.pytest_plugin",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, *tests], cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, check=False
    )
    return done.returncode == 0


def is_found(mutation: Mutation, tree: Path) -> bool:
    """Make the mistake, run the test, and undo it."""
    path = tree / mutation.path
    before = path.read_text(encoding="utf-8")
    assert before.count(mutation.right) == 1, f"{mutation.path} has not one {mutation.right!r}"
    path.write_text(before.replace(mutation.right, mutation.wrong), encoding="utf-8")
    try:
        return not run([mutation.found_by], tree)
    finally:
        path.write_text(before, encoding="utf-8")


def main() -> int:
    """Print what becomes of each."""
    names = sys.argv[1:] or list(MUTATIONS)
    with tempfile.TemporaryDirectory(prefix="xllm_lab_mutations_") as folder:
        for part in COPIED:
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
        os.environ.setdefault("FAKE_CANN_LIB", str(ROOT / "build" / "npu" / "lib"))
        if not run(sorted({MUTATIONS[name].found_by for name in names}), Path(folder)):
            sys.stdout.write("the tests fail without any mistake\n")
            return 1
        missed = 0
        for name in names:
            found = is_found(MUTATIONS[name], Path(folder))
            missed += not found
            sys.stdout.write(f"{'found ' if found else 'MISSED'} {name} by {MUTATIONS[name].found_by}\n")
            sys.stdout.flush()
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

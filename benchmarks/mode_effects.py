"""What planning ahead and captured graphs are worth: measured on the engine, and predicted by the simulator.

    python benchmarks/mode_effects.py --layers 4 --hidden 256 --repeats 5

A random Llama small enough for the host to matter. Modes take turns on the engine; the simulator is calibrated on runs
of another workload, planned in turns, eager and in graphs. Prints a Markdown table: the end of the run in each mode
against eager steps planned in turns, measured (median, range over the repeats) and predicted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from host_gap import CONFIG, workload

from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.records import Records
from xllm_lab.sim.calibrate import Calibration, calibrate
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.machine import Machine, fitted_machine
from xllm_lab.sim.simulator import run_simulation


def write_model(folder: Path, *, layers: int, hidden: int) -> None:
    """A random Llama with a vocabulary of 1,000."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=CONFIG.max_model_len,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class Mode(NamedTuple):
    """How steps are planned, and where they run."""

    async_scheduling: str
    shapes: str

    def config(self) -> InstanceConfig:
        return replace(CONFIG, async_scheduling=self.async_scheduling)

    def shapes_policy(self) -> ShapesPolicy:
        policy: ShapesPolicy = make_policy("shapes", self.shapes)
        return policy


IN_TURNS = Mode("off", "eager")
GRAPHS = ("powers-of-two", "xllm-buckets")
MODES = (*(Mode(a, "eager") for a in ASYNC_SCHEDULING), *(Mode(a, s) for s in GRAPHS for a in ("off", "length_aware")))


def end_us(records: Records) -> int:
    return max(r.finish_us or 0 for r in records.requests)


def measured(engine: Engine, args: argparse.Namespace, folder: Path) -> tuple[dict[Mode, list[int]], Calibration]:
    """Ends of the held-out workload in each mode, and a calibration on another one, eager and in graphs."""
    held_out, learn, runs = workload(args.requests), workload(args.requests + 7), []
    ends: dict[Mode, list[int]] = {mode: [] for mode in MODES}
    for repeat in range(args.repeats):
        for shapes in ("eager", *GRAPHS):
            mode, out = Mode("off", shapes), folder / f"{shapes}-{repeat}"
            runs.append(
                engine.replay(learn, mode.config(), Policies(DecodeFirst(), shapes=mode.shapes_policy()), out=out)
            )
        for mode in MODES:
            records = Records()
            engine.serve(held_out, mode.config(), Policies(DecodeFirst(), shapes=mode.shapes_policy()), records)
            ends[mode].append(end_us(records))
    return ends, calibrate(runs)


def predicted_us(machine: Machine, mode: Mode, num_requests: int) -> int:
    timing = Predicted(machine.cost_of(mode.config()))
    vocab_size, shapes = machine.model["vocab_size"], mode.shapes_policy()
    return end_us(
        run_simulation(
            workload(num_requests), mode.config(), Policies(DecodeFirst(), shapes=shapes), timing, vocab_size=vocab_size
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model", layers=args.layers, hidden=args.hidden)
        engine = Engine(EngineOptions(model=str(Path(folder) / "model"), device="cpu", timer="cpu"))
        ends, calibration = measured(engine, args, Path(folder))
    machine = fitted_machine(calibration)
    print(f"Host {machine.host.step_us:.0f} us a step and {machine.host.sequence_us:.1f} us a sequence.\n")
    print("| planned | steps run | measured ms | effect | predicted ms | effect |\n|---|---|---|---|---|---|")
    base_us = predicted_us(machine, IN_TURNS, args.requests)
    for mode in MODES:
        us = predicted_us(machine, mode, args.requests)
        ratios = [one / other - 1 for one, other in zip(ends[mode], ends[IN_TURNS], strict=True)]
        print(
            f"| {mode.async_scheduling} | {mode.shapes} | {statistics.median(ends[mode]) / 1e3:.1f} "
            f"| {statistics.median(ratios):+.1%} ({min(ratios):+.1%} to {max(ratios):+.1%}) "
            f"| {us / 1e3:.1f} | {us / base_us - 1:+.1%} |"
        )


if __name__ == "__main__":
    main()

"""The verb `accept`: does a machine serve as it must, and what does the simulator need to know of it?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from xllm_lab.errors import ConfigError

if TYPE_CHECKING:
    from xllm_lab.acceptance import Acceptance


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, npu or auto")
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder with config.json, or a .gguf file")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="in each replay")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each operator's measurement")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    parser.add_argument("--out", type=Path, help="new folder for all that is found")


def accepted(o: argparse.Namespace) -> Acceptance:
    """What the plan found."""
    from xllm_lab.acceptance import Options, accept

    if o.out is None:
        raise ConfigError("no --out; accepted: a new folder, or --dry-run to see the plan")
    wanted = Options(
        model=o.model, device=o.device, dtype=o.dtype, threads=o.threads, num_requests=o.requests, repeats=o.repeats
    )
    return accept(wanted, o.out)

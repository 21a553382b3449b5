"""Serves the crowd in graphs in a process of its own, and prints tokens and device calls: `serve_once MODEL`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests import fake_cann

fake_cann.start()

from tests.fake_cann import control  # noqa: E402 (the fake comes before torch)
from tests.npu.engines import engine, install_operators, let_float32_through, served  # noqa: E402
from tests.npu.test_npu_serving import crowd  # noqa: E402


def main() -> None:
    """Print one line of JSON."""
    install_operators()
    let_float32_through()
    with control.counting() as counts:
        tokens, _ = served(engine("npu", model=Path(sys.argv[1])), crowd(), shapes="xllm-buckets")
    sys.stdout.write(json.dumps({"tokens": tokens, "calls": counts.calls()}) + "\n")


if __name__ == "__main__":
    main()

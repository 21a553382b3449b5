"""Entry point of the `xllm-lab` command, and the only place that exits."""

from __future__ import annotations

import os
import sys

# OpenMP's default lets idle threads spin; on a busy machine a step then takes fifty times as long. It is read when
# torch is first imported, so it is set before anything of ours is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from xllm_lab.cli import run


def main() -> None:
    """Run the command: 0 done, 1 a check said no, 2 the user can mend it, 130 interrupted."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

"""A stub CANN runtime on which the real torch_npu runs on a CPU (README.md says what that proves).

`start()` before the first `import torch`, then `torch.npu` works; `control` reads the counters and sets the order of
execution, `operators.install` gives operators their references.
"""

from __future__ import annotations

import atexit

from . import control

_started = False


def start(*, num_devices: int = 2) -> None:
    """Loads the fake, imports torch_npu on it and puts the kernels in place. Later calls do nothing."""
    global _started  # noqa: PLW0603
    if _started:
        return
    control.load(num_devices=num_devices)
    import torch
    import torch_npu  # noqa: F401

    from . import kernels

    torch.npu.init()
    control.attach_poison()
    kernels.install()
    atexit.register(control.set_order, "program")  # no thread may want the interpreter after its end
    _started = True

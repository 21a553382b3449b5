"""The real engine: plain PyTorch on npu, cuda and cpu. Read `engine.py`, then `runner.py`, then `model.py`."""

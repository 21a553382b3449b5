"""Operators of torch_npu. Read `calls.py`, which has them all, then `serving.py`, which serves our model with them."""

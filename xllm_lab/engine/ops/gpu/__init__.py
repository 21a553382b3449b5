"""Operators in Triton, for CUDA. Read `serving.py`, then the kernels: `attention.py` and `rowwise.py`.

Only `serving.py` can be imported where Triton is absent; it imports the kernels when they are first wanted.
"""

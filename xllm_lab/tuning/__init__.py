"""Search in the simulator, verify on the engine, hand over to production.

Read `space.py`, `search.py` (one level), `rising.py` (all levels), `verify.py`.
"""

"""Search in the simulator, verify on the engine, hand over to production. Read `space.py`, `search.py`, `verify.py`."""

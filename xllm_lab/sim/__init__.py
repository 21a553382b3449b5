"""The discrete-event model. It drives the engine's scheduler; only time can differ, and `compare` says by how much.

Read `instance.py`, then `simulator.py`, then `calibrate.py`. Runs with torch absent.
"""

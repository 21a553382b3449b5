"""Policies: pure decisions that engine and simulator share. A policy sees a view and returns a plan.

`api` is the interface, `checks` what a plan must obey, `catalog` finds every policy. One file per decision follows.
Nothing here knows a clock, a random number, a log, a file, torch or SimPy.
"""

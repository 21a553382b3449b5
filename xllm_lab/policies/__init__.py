"""Policies: pure decisions that engine and simulator share. A policy sees a view and returns a plan.

`api` is the interface of batch policies, `routing`, `failover` and `roles` are a fleet's, `shapes` says in which
captured graph a step runs; `checks`, `fleet_checks` and `shape_checks` say what a plan must obey, `catalog` finds every
policy. One file per policy follows, in a folder per decision.
Nothing here knows a clock, a random number, a log, a file, torch or SimPy.
"""

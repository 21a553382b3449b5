"""Everything the package raises on purpose.

    XllmLabError
    ├── UserError (also a ValueError): something the user can mend; the command prints one line and exits with 2
    │   ├── TraceError           a trace row that cannot be read
    │   ├── ConfigError          an unknown or impossible option, knob, policy or fit
    │   ├── RequestTooLargeError a request that could never run on this configuration
    │   ├── ModelError           a model that cannot be loaded
    │   ├── ProfileError         a profiler's output that cannot be read
    │   ├── RankError            a process of an engine of several that is lost
    │   ├── InstanceError        an engine process of a fleet that does not come up
    │   └── RunError             a run folder that is missing, unfinished, or cannot be written
    └── PolicyError              a policy returned an illegal plan; its author is to blame, not the user

A message names the value that was given and what is accepted.
"""

from __future__ import annotations


class XllmLabError(Exception):
    """Root of the tree."""


class UserError(XllmLabError, ValueError):
    """Something the user can mend."""


class TraceError(UserError):
    """A trace row that cannot be read; the message names file, line, field and value."""


class ConfigError(UserError):
    """An unknown or impossible option, knob, policy or fit."""


class RequestTooLargeError(UserError):
    """A request that could never run: longer than the context, or larger than the whole KV pool."""


class ModelError(UserError):
    """A model that cannot be loaded: unknown name, unsupported architecture, or corrupt weights."""


class ProfileError(UserError):
    """A profiler's output that cannot be read; the message names file, line, column and value."""


class RankError(UserError):
    """A process of an engine of several, or one that shares experts with it, that failed, died, or does not answer."""


class InstanceError(UserError):
    """An engine process of a fleet that does not come up. One that is lost later is a matter of the failover policy."""


class RunError(UserError):
    """A run folder that is missing, unfinished, or cannot be written."""


class PolicyError(XllmLabError):
    """A policy returned a plan that the shared checks refuse."""

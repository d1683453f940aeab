"""The one failure that a rollout survives: a server that is gone, or has other weights than it should."""

from __future__ import annotations


class ServerLost(RuntimeError):
    """A server did not answer as it should, and may after it got the weights anew; says which, and why."""

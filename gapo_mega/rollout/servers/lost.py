"""The one failure that a rollout survives: a server that is gone, or has other weights than it should."""

from __future__ import annotations

SERVER_LOST = 69  # exit code of a run that has lost one for good (EX_UNAVAILABLE)


class ServerLost(RuntimeError):
    """A server did not answer as it should, and may after it got the weights anew; says which, and why."""

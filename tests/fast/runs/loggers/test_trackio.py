"""What Trackio's own database holds."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gapo_mega import optional
from tests.helpers.logged_runs import LAST, PICTURES, finished, log_all, metrics_of

pytestmark = pytest.mark.skipif(not optional.trackio().usable, reason="trackio is not installed")


def test_placeholder() -> None:
    assert importlib and json and subprocess and Path and Any and LAST and PICTURES and finished and log_all and metrics_of

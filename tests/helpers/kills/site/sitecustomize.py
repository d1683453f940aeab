"""Python imports this at the start of every process whose PYTHONPATH has this folder."""

from tests.helpers.kills import observer

observer.begin()

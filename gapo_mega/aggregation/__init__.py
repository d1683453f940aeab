"""Turns the Gram matrix of the objective gradients into the weights of the update direction.

``build("gapo", p=1)(gram)`` gives the weights; ``diagnose(gram, weights)`` says what they do. Every
file of this folder that defines an ``Aggregator`` is a method; see docs/extending.md.
"""

from gapo_mega.aggregation.base import Aggregator, NonFiniteGramError, ZeroGradientError
from gapo_mega.aggregation.diagnosis import Diagnosis, diagnose
from gapo_mega.aggregation.on_device import DeviceMethod
from gapo_mega.aggregation.on_host import HostMethod, Solution
from gapo_mega.aggregation.registry import build, methods
from gapo_mega.aggregation.safe import safe_weights

__all__ = [
    "Aggregator",
    "DeviceMethod",
    "Diagnosis",
    "HostMethod",
    "NonFiniteGramError",
    "Solution",
    "ZeroGradientError",
    "build",
    "diagnose",
    "methods",
    "safe_weights",
]

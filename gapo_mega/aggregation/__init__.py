"""From the Gram matrix of the objective gradients to the weights of the update direction.

``build("gapo", p=1)(gram)`` gives the weights; ``diagnose(gram, weights)`` says what they do. Every
file of this folder that defines an ``Aggregator`` is a method; see docs/extending.md.
"""

from gapo_mega.aggregation.base import Aggregator, NonFiniteGramError, Solution, ZeroGradientError
from gapo_mega.aggregation.diagnosis import Diagnosis, diagnose
from gapo_mega.aggregation.registry import build, methods

__all__ = [
    "Aggregator",
    "Diagnosis",
    "NonFiniteGramError",
    "Solution",
    "ZeroGradientError",
    "build",
    "diagnose",
    "methods",
]

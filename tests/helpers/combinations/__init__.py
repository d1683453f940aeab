"""Every combination of settings that gradients depend on, against transformers and autograd in float64.

``python -m tests.helpers.combinations --help``; ``make combinations``. There are too many combinations
for a test suite: they are run in an order that meets every pair and triple of settings early, for as long as
one has.
"""

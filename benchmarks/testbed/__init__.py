"""Every method on a policy whose true Pareto front is known exactly: ``python -m benchmarks.testbed``."""

"""Inference servers beside a training: their processes, what is asked of them, and how they get weights."""

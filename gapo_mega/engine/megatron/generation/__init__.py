"""Sampling from the Megatron model with a KV cache."""

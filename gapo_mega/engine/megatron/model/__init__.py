"""Megatron models: built, run forward, wrapped for training, frozen."""

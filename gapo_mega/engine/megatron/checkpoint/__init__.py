"""Weights and optimizer states in and out: Hugging Face directories, Megatron checkpoints, resumable runs."""

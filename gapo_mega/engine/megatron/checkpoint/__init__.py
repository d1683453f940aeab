"""Loads and saves weights and optimizer states as Hugging Face directories and Megatron checkpoints."""

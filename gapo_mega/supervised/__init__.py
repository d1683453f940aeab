"""Data of supervised training: preference pairs for reward models, conversations for fine-tuning."""

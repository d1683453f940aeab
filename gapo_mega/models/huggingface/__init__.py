"""Hugging Face directories: where they are, what they say, their weights read and written."""

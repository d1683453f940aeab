"""Rows of files, turned into prompts, pairs and conversations, and these into tokens."""

"""GGUF files: their configuration, tensors and tokenizer."""

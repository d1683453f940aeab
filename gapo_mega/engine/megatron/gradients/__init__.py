"""Gradients of every objective, their Gram matrix, and the combination in Megatron's own buffer."""

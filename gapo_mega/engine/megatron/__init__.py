"""The Megatron wall: the only folder that imports ``megatron``."""

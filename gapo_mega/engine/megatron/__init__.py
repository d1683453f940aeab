"""The engine over Megatron-core: the only folder that imports ``megatron``."""

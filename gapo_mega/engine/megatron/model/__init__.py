"""Building Megatron models, running them, wrapping them for training, freezing them."""

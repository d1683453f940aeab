"""The engine over Megatron-core: the only folder that imports ``megatron``."""

from gapo_mega.engine.megatron.runtime import fusers

fusers.decide()  # all that imports Megatron comes by here first

"""Arithmetic from a configuration, without a device: layout, passes, memory, FLOPs."""

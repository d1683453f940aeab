"""What needs a device and a clock: benchmarks of steps and of whole runs."""

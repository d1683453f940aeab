"""What Megatron needs around it: process groups, random numbers, a device name on CPUs, a clock."""

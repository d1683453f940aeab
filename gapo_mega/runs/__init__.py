"""What a run does and writes: its checks, its loop, its checkpoints, its log, its end."""

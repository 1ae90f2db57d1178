"""The training loop, its checkpoints, devices, processes and random numbers."""

"""Released checkpoints by name, reading files, and loading weights. Nothing here imports the network."""

"""Checkpoints: the released files by name, reading files, and loading weights into a backbone or a head.

Nothing here imports the network: overlock_mm.models imports this package.
"""

"""Pictures that explain a network: one module for each kind, and what they share (networks.py, page.py)."""

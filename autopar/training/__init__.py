"""The training loop behind ``autopar train``."""

"""Layers of experts that are computed for all tokens: how they are found, and the same for the chosen pairs alone."""

"""Batches for the ranks of a mesh: the part that each has, read from files, and padded where that is needed."""

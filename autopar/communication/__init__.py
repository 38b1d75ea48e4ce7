"""Processes of a mesh and what they send each other: groups, collectives and messages on torch.distributed."""

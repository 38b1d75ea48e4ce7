"""All ranks of a mesh in one process, in lock-step."""

"""Proof, before anything runs on devices, that the programs of all ranks compute the unmodified model's step."""

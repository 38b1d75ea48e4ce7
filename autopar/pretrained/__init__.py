"""Pretrained models of Hugging Face: into parallel modules, and out of them and their checkpoints."""

"""Measurements. Each file is a command: ``python -m benchmarks.NAME``; what they found is in README.md."""

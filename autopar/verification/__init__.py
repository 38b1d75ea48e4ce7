"""Checks of the compiler itself: each rule against its operator, coverage of models."""

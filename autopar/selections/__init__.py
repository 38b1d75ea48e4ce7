"""Rows that a condition selects, written as operators of fixed sizes."""

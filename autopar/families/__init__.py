"""Families: programs of one model that differ in sizes only, fitted from a few compiled ones."""

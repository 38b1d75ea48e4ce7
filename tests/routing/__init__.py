"""Tests of autopar.routing."""

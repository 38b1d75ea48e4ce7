"""Rows to the ranks of their experts: the regions of a graph that are routed, and the weights that are dealt out."""

"""Regions of rank programs compiled by torch's Inductor (``Plan(compile="inductor")``)."""

"""Calls of a parallel module: which program runs for one, made when it is first needed, agreed on by the ranks."""

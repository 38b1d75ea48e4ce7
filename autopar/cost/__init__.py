"""The cost of an operator on a machine: operations, bytes, seconds, and the values kept for backward."""

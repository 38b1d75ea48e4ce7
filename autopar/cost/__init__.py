"""What a machine takes for an operator: operations, bytes, seconds, and the values kept for backward."""

"""From an unmodified model to a traced program: torch.export, and what has to be undone or caught on the way."""

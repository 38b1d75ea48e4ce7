"""From an unmodified model to a traced program: torch.export, and the changes that make its graph exact."""

"""DTensors of a parallel module: where their parts lie, and what scripts do with them, done right."""

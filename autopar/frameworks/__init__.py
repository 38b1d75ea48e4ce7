"""What lets loops of other frameworks train a parallel module: docs/frameworks.md."""

"""Programs on disk: written whole, read without running anything that is in them."""

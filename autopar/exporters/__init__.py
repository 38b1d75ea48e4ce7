"""Programs in the formats of other tools: ``autopar.export`` and ``autopar export``."""

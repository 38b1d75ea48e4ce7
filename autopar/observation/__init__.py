"""What a run of forward reads of Python, and what it leaves there: watched while a model is traced."""

"""The bytes that a rank holds in a training step, counted on graphs and shapes: nothing is run, no tensor allocated."""

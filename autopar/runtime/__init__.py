"""A rank's program at work: bound to the tensors of a module, one step or one pipeline stage after the other."""

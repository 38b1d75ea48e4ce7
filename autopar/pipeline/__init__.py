"""Pipeline parallelism: the cut into stages, values that stages duplicate, the interpreter of their instructions."""

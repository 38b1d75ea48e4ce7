"""Pipeline parallelism: where stages are cut, what they share, how their instructions are interpreted."""

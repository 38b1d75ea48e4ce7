"""Questions about a program: why a value is laid out as it is, what a rank holds and sends."""

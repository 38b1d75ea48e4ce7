"""Parameters and buffers on one rank: under the model's names, stored as a program has them laid out."""

"""A page to look at: what a program holds, sends and does when, as data and as one HTML file."""

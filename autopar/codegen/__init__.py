"""From a graph to the Python that one rank runs."""

"""From a forward graph to forward and backward: recording, cutting in two, halves, what is kept between them."""

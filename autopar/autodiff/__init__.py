"""From a forward graph to forward and backward: recording, partition, halves of backward, recomputation."""

"""How one mesh axis is split: where splits may flow, what they cost, the cheapest choice, the rewritten graph."""

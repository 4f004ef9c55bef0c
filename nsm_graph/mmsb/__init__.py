"""The Transformer as pages, deltas and a shadow graph."""

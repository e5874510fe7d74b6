"""The shared store of a fit: measurements and decisions of many workers."""

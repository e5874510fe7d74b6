"""Converts messages to the core's values and back, for the server. Knows nothing of handlers."""

"""The server's settings: their fields, their sources, and the small files that they name."""

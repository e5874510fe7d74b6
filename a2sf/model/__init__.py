"""A model's files: where they are, whether they can be served, and loading them."""

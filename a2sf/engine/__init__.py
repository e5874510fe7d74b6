"""The engine: admits requests, reads their prompts, decodes all rows together, draws tokens."""

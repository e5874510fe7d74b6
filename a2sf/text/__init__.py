"""From a conversation to the text that a model reads, and from tokens back to text."""

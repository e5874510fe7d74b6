"""The cache: slots for each head, scores, eviction, and attention over what is kept.

Owns the law. Knows nothing of models, of requests or of time.
"""

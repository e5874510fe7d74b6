"""Fits tables of forgetting factors to a model and a dataset, and proves them on held-out data."""

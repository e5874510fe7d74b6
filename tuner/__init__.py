"""Fits a table of forgetting factors to a model and a dataset, and proves it on held-out data."""

"""Checks this engine on a GPU, then times it beside its peers.

    python -m benchmarks.gpu [--minutes 10] [--only NAME ...] [--out FILE] [--peer-python PATH]

One command for a machine with a CUDA device and without a network, on random models of real shapes.
Each part has a share of the time; its results are on disk before the next begins. This file imports
nothing, because workers in other environments would import it too.
"""

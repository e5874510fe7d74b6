"""This engine on a GPU beside its peers: what it computes is checked first, then it is timed.

    python -m benchmarks.gpu [--minutes 10] [--only NAME ...] [--out FILE] [--peer-python PATH]

One command for a machine with a CUDA device and no network, on random models of real shapes. Each
part has a share of the time; what a part measured is on disk when the next begins. Nothing is
imported here: the worker of other environments would pay for it.
"""

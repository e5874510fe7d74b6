"""The engines that the grid compares, each behind a worker process in an environment of its own.

A worker (`worker_*.py`) is started as `python -m peers.worker_x` with only this package's parent on
its path, so it runs where nothing of this project is installed. Everything else here runs in the
project's own environment. Nothing is imported here: a worker would pay for it.
"""

"""The engines that the grid compares, each in a worker process with a separate environment.

A worker (`worker_*.py`) is started as `python -m peers.worker_x` with only this package's parent on
its path, so it runs without an installation of this project. All other modules run in the project's
environment. This file imports nothing, because every worker would import it too.
"""

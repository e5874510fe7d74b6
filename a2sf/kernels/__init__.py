"""The law in Triton, for devices that it compiles for.

Nothing here imports Triton; the modules that do are imported by who is about to run them.
"""

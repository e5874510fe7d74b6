"""Generated from `proto/` by `scripts/generate_proto.py`; not edited by hand."""

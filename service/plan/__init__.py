"""Capacity planning: `python -m service plan` sizes a server by arithmetic, before it starts.

`cli` owns the flags, `units` the notation of sizes and rates, `devices` published figures of GPUs,
`capacity` bytes and operations, `sizing` what fits, `pace` time, replicas and cost, `report` the
output. No module loads weights or measures anything.
"""

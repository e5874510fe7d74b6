"""`python -m service plan`: what a server would take and give, as arithmetic, before it is started.

`cli` owns the flags, `units` what sizes and rates are written as, `devices` published figures of
GPUs, `sizing` what fits, `pace` time, replicas and cost, `report` how it is shown. None of them
loads weights or measures anything.
"""

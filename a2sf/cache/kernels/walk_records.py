"""The records by which `walk` tells its kernels what to do.

Owns the layout of `HEAD` and `CALL`, which `walk` fills and `walk_programs` reads. Knows nothing of
the law.
"""

import numpy as np

HEAD = np.dtype(
    [
        ("vectors", np.int64),  # offset of the head's first slot in keys and values, in numbers
        ("marks", np.int64),  # index of the head's first slot in positions and scores
        ("budget", np.int64),  # slots
        ("recent", np.int64),  # tokens
        ("sinks", np.int64),  # tokens
        ("random_seed", np.int64),  # -1 if scores accumulate attention
        ("number", np.int64),  # the model-wide head number
        ("start", np.int64),  # the position of the first token
        ("first", np.int64),  # the index of the first token in queries, keys and values
        ("tokens", np.int64),  # number of tokens
        ("alpha", np.float32),
        ("scored", np.int32),  # whether the scores depend on attention
    ]
)
"""One row and KV head of a layer."""

CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            # Addresses of the tokens' projections and output.
            "query",
            "keys",
            "values",
            "output",
            # Their strides, in elements.
            "query_row",
            "query_head",
            "query_token",
            "keys_row",
            "keys_head",
            "keys_token",
            "values_row",
            "values_head",
            "values_token",
            "output_row",
            "output_head",
            "output_token",
            # Addresses of the layer's slots.
            "stored_keys",
            "stored_values",
            "score",
            "position",
            # Addresses: [pairs] HEAD; [pairs] int64, the heads in the order of work; one int64
            # each, the counters of started heads and of started workers.
            "heads",
            "order",
            "begun",
            "working",
            # Address of bytes [pairs, retained_side, retained_side], 1 for tokens that a query
            # could attend to; address 0 for no record.
            "retained",
            "retained_side",
            # Address of float32 scratch memory, and its size per worker in numbers.
            "scratch",
            "scratch_size",
            "room",  # slots that fit into a worker's scratch
            "pairs",
            "kv_heads",
            "group",
            "dim",
        )
    ]
    + [("scale", np.float64)]
)
"""The arguments of a launch."""

BROUGHT = 16
"""Number of first fields of a CALL that change with every call."""

"""Runs transformers in this process, with caches filled by random numbers, step by step.

`Dynamic` decodes as `generate` does, but without its surrounding work, which favours this peer.
`Batching` runs the body of the loop behind `generate_batch`, with its CUDA graphs. Its pages are
filled by the scheduler alone; the model's forward pass is skipped. Rows share no pages. Knows
nothing of this engine.
"""

from typing import Any

import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from benchmarks.gpu.report import NotSupported

PAGE = 256
"""Tokens of a page, transformers' default."""

READ_AT_ONCE = 4096
"""Prompt tokens per batch of the filling. They are not computed, but without flash attention a mask
with this many rows is allocated."""


class Dynamic:
    """Rows with a cache that grows by a copy in every step."""

    def __init__(self, module: Any, rows: int, context: int) -> None:
        config = module.config
        self._module = module
        self.cache = DynamicCache(config=config)
        shape = (rows, config.num_key_value_heads, context, config.head_dim)
        for layer in range(config.num_hidden_layers):
            keys, values = (
                torch.randn(shape, dtype=module.dtype, device=module.device) for _ in range(2)
            )
            self.cache.update(keys, values, layer)
        self._ids = torch.arange(rows, device=module.device)[:, None] % config.vocab_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache's tensors."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    @torch.inference_mode()
    def step(self) -> None:
        """Decode a token of every row and bring it to the host."""
        logits = self._module(
            input_ids=self._ids, past_key_values=self.cache, logits_to_keep=1
        ).logits
        self._ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        self._ids.tolist()

    def close(self) -> None:
        """Release the cache."""
        del self.cache


class Batching:
    """Requests of one continuous batching manager that decode together."""

    def __init__(self, module: Any, rows: int, context: int, room: int) -> None:
        on_gpu = module.device.type == "cuda"
        # Rows that are filled first already decode while the others are filled.
        self._filling = 2 * rows * (context // READ_AT_ONCE + 1) + 2
        longest = context + room + self._filling
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=rows * (-(-longest // PAGE) + 1),
            max_batch_tokens=max(READ_AT_ONCE, rows),
            max_requests_per_batch=rows,
            # With shared prompt pages, all rows would read them only once.
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=on_gpu,
        )
        generation = GenerationConfig(
            max_new_tokens=longest - context, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        self._rows = rows
        try:
            self._manager = module.init_continuous_batching(generation, config)
        except Exception:
            # By default it wants flash attention from a hub, which this machine may not reach.
            config.auto_switch_to_flash = False
            self._manager = module.init_continuous_batching(generation, config)
        self.attention = str(module.config._attn_implementation)
        with torch.no_grad():
            self._loop = self._manager._create_batch_processor()
        self._manager.batch_processor = self._loop
        self._manager.current_batch = 0
        self._loop.cache.cache_tensor.view(module.dtype).normal_()
        self._fill(context)

    def _fill(self, context: int) -> None:
        runner = self._loop.model_runner
        compute = runner.compute_batch
        runner.compute_batch = lambda model, batch: None
        try:
            for row in range(self._rows):
                self._manager.add_request([(row + at) % 100 + 1 for at in range(context)])
            for _ in range(self._filling):
                self._advance()
                if len(self._states) == self._rows and self._made() >= self._rows:
                    break
        finally:
            runner.compute_batch = compute
        if len(self._states) < self._rows or any(not s.generated_len() for s in self._states):
            raise NotSupported("continuous batching did not take up all rows at once")

    @property
    def _states(self) -> list[Any]:
        return list(self._loop.scheduler.active_requests.values())

    def _made(self) -> int:
        return sum(state.generated_len() > 0 for state in self._states)

    @torch.no_grad()
    def _advance(self) -> None:
        self._manager._generation_loop_body(self._loop, bootstrapping=False)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pool of pages."""
        return int(self._loop.cache.cache_tensor.nbytes)

    def step(self) -> None:
        """Decode a token of every row; the loop itself brings it to the host."""
        before = sum(state.generated_len() for state in self._states)
        self._advance()
        made = sum(state.generated_len() for state in self._states) - before
        if made != self._rows:
            raise RuntimeError(f"{made} of {self._rows} rows were decoded in a step")

    def close(self) -> None:
        """Free every row's pages."""
        self._loop.reset()
        self._manager.batch_processor = None
        del self._loop, self._manager

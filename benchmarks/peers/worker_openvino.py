"""OpenVINO GenAI's continuous batching as a peer, with cache eviction if there is a budget.

Runs on an IR written by `export_openvino`. Rows share no pages. With prefix caching all rows would
read the same pages, which then come from the processor's cache and not from memory.
"""

from typing import Any

import numpy
import openvino
import openvino_genai as genai

from .loop import Filling, NotSupported, serve, timed

BLOCK = 32
"""Tokens of a KV block on processors."""

PRECISION = {"float32": "f32", "bfloat16": "bf16"}


def blocks(tokens: int) -> int:
    """The number of blocks that this many tokens need."""
    return -(-tokens // BLOCK)


def eviction(budget: int) -> Any:
    """OpenVINO's eviction at our budget: sinks and recent tokens in whole blocks, the rest scored.

    Only full blocks are evicted, so a row holds up to one block more than `budget`; the answer
    contains the number.
    """
    recent = BLOCK * max(1, budget // 8 // BLOCK)
    if budget % BLOCK or budget <= BLOCK + recent:
        raise NotSupported(
            f"a budget of {budget} tokens; OpenVINO's must be a multiple of its block of {BLOCK} "
            f"and above {BLOCK + recent}, its first and recent tokens"
        )
    return genai.CacheEvictionConfig(
        start_size=BLOCK,
        recent_size=recent,
        max_cache_size=budget,
        aggregation_mode=genai.AggregationMode.NORM_SUM,
    )


class Rows:
    """Requests of one pipeline that decode together."""

    def __init__(self, model: str, dtype: str, threads: int, filling: Filling) -> None:
        length, batch, budget = len(filling.prompt), filling.batch, filling.budget
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        # Prompts are processed first and whole; rows do not decode while another is filled.
        scheduler.dynamic_split_fuse = False
        scheduler.max_num_batched_tokens = max(length, batch)
        scheduler.max_num_seqs = batch
        if budget is None:
            self._pool = batch * (blocks(length + filling.room + batch) + 1)
        else:
            scheduler.use_cache_eviction = True
            scheduler.cache_eviction_config = eviction(budget)
            # Nothing is evicted while a prompt is read; one step later its row has shrunk.
            self._pool = blocks(length) + 2 + batch * (blocks(min(budget, length)) + 3)
        scheduler.num_kv_blocks = self._pool
        precision = PRECISION[dtype]
        self._pipeline = genai.ContinuousBatchingPipeline(
            model,
            scheduler,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "KV_CACHE_PRECISION": precision,
                "INFERENCE_NUM_THREADS": threads,
            },
        )
        self._batch = batch
        self._handles = []
        self.prefill_s = 0.0
        for row in range(batch):
            self._handles.append(self._add(row, filling))
            seconds = timed(self._pipeline.step)
            self.prefill_s = self.prefill_s or seconds
            if budget is not None:
                self._pipeline.step()
        self.kv_bytes = int(self._pipeline.get_metrics().cache_size_in_bytes)
        self._tokens = 0.0

    def _add(self, row: int, filling: Filling) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = filling.room + 2 * filling.batch + 2
        config.do_sample = False
        config.ignore_eos = True
        # Required, although no token ends a completion.
        config.set_eos_token_id(1)
        prompt = openvino.Tensor(numpy.array([filling.prompt], dtype=numpy.int64))
        return self._pipeline.add_request(row, prompt, config)

    def step(self) -> float:
        """Decode one token of every row."""
        seconds = timed(self._pipeline.step)
        metrics = self._pipeline.get_metrics()
        if metrics.scheduled_requests != self._batch:
            raise RuntimeError(
                f"{metrics.scheduled_requests} of {self._batch} rows were decoded in a step"
            )
        self._tokens = metrics.cache_usage / 100 * self._pool * BLOCK / self._batch
        return seconds

    def kv_tokens(self) -> float:
        """Capacity of a row's blocks, in tokens."""
        return self._tokens

    def close(self) -> None:
        """Cancel the requests, so that the pipeline can be released."""
        for handle in self._handles:
            handle.cancel()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        del self._pipeline, self._handles


class OpenVino:
    """The pipeline, with or without eviction."""

    packages = ("openvino", "openvino-genai", "optimum-intel")

    def load(self, model: str, dtype: str, threads: int) -> None:
        """Only store the settings: each batch has a separate pipeline, which loads the model."""
        self._settings = (model, dtype, threads)

    def fill(self, filling: Filling) -> Rows:
        """Make a pipeline with a pool of exactly these rows."""
        return Rows(*self._settings, filling)


if __name__ == "__main__":
    serve(OpenVino())

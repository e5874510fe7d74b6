"""Generation for the harness: runs requests on the serving engine.

Owns the size of the engine. Knows nothing of the harness's requests.
"""

from collections import deque
from collections.abc import Callable, Sequence

from a2sf.engine.config import EngineConfig
from a2sf.engine.engine import Engine
from a2sf.model.loader import LoadedModel
from a2sf.policy import CachePolicy, EffectivePolicy
from a2sf.requests import Delta, Failed, Finished, GenerationRequest


def complete(
    model: LoadedModel,
    requests: Sequence[GenerationRequest],
    policies: Sequence[EffectivePolicy],
    *,
    rows: int,
    on_end: Callable[[], object],
) -> tuple[list[str], dict[int, BaseException]]:
    """Run requests, whose ids are their indices, on an engine that is as large as they need.

    Args:
        model: generates.
        requests: at least one.
        policies: of each request, resolved; they give the sizes of the engine.
        rows: largest number of requests that run together.
        on_end: called after each request.

    Returns:
        The text of each request, and the errors of failed ones by index.
    """
    rows = min(rows, len(requests))
    engine = Engine(
        model,
        EngineConfig(
            slots=max(max(map(max, policy.head_budgets)) for policy in policies),
            max_batch=rows,
            max_prefill_tokens=max(
                policy.staging_slots(len(one.prompt_ids))
                for policy, one in zip(policies, requests, strict=True)
            ),
            default_policy=CachePolicy(preset="full"),
        ),
    )
    texts = [""] * len(requests)
    failures: dict[int, BaseException] = {}
    pending = deque(requests)
    while pending or engine.has_work:
        while pending and engine.running + engine.waiting < rows:
            engine.submit(pending.popleft())
        for event in engine.step():
            if isinstance(event, Delta):
                texts[int(event.request_id)] += event.text
            elif isinstance(event, Finished | Failed):
                on_end()
                if isinstance(event, Failed):
                    failures[int(event.request_id)] = event.error
    return texts, failures

"""Translates the arguments of `a2sf-lm-eval` to a policy for each sequence and a sampling.

Owns the names, ranges, defaults and help texts of model arguments, and which generation arguments
are refused. Knows nothing of requests.
"""

import sys
from collections.abc import Mapping
from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator

from a2sf.cache.budgets import resolve
from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel
from a2sf.policy import CachePolicy, EffectivePolicy
from a2sf.requests import Sampling
from a2sf.schema import AlphaTable, Count, Frozen, Positive, Ratio
from tuner.evaluation import policy_specs
from tuner.evaluation.results import Size

AUTOMATIC_ROWS = 32
"""The value of `batch_size=auto`."""

_SAMPLING = ("top_k", "top_p", "min_p")
_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}
"""Other engines' arguments, accepted only at the value that has no effect."""


class Arguments(Frozen):
    """The model arguments. The harness passes numbers as numbers or as strings."""

    model_config = ConfigDict(strict=False, coerce_numbers_to_str=True)

    pretrained: str = Field(
        description="`reference` for the packaged model, a directory, a GGUF file, or a hub id."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit, for a hub id.")
    policy: str = Field(
        default="full",
        description="One policy in the form of `a2sf-tune evaluate --policies`, or the file or "
        "shipped name of an alpha table.",
    )
    ratio: Ratio | None = Field(
        default=None,
        description="Share of a sequence's tokens that each head keeps, above 0 and up to 1. A "
        "sequence is context and continuation, or prompt and max_gen_toks as in serving.",
    )
    slots: Positive | None = Field(
        default=None,
        description="Tokens that each head keeps. Every policy except full needs ratio or slots; "
        "an alpha table without either uses its own budget.",
    )
    prefill_chunk: Count | None = Field(
        default=None,
        description="Tokens of a prompt block, after each of which the cache is trimmed; 0 is "
        "exact, 1 the step-by-step pruning of the A2SF paper. Default: the table's value, or 0.",
    )
    device: str = Field(default="auto", description="As for a2sf-serve.")
    dtype: str = Field(default="auto", description="As for a2sf-serve.")
    batch_size: Positive = Field(
        default=1,
        description=f"Rows of one pass; auto is {AUTOMATIC_ROWS}. It changes no result.",
    )
    max_batch_size: Positive | None = Field(
        default=None, description="Upper limit for batch_size=auto."
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Largest number of tokens of a sequence; by default, and at most, the model's "
        "context. A longer sequence loses its beginning.",
    )
    seed: Count = Field(
        default=0, lt=2**31, description="Seed of the policy random and of sampling."
    )

    @field_validator("batch_size", mode="before")
    @classmethod
    def _auto(cls, value: object) -> object:
        return AUTOMATIC_ROWS if str(value).split(":")[0] == "auto" else value

    @classmethod
    def read(cls, given: Mapping[str, object]) -> Self:
        """Check the arguments. Raises InvalidArgument for the first that is not accepted."""
        unknown = next((name for name in given if name not in cls.model_fields), None)
        if unknown is not None:
            raise InvalidArgument(unknown, f"unknown; accepted: {', '.join(cls.model_fields)}")
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            value = f"{given[name]!r}; " if name in given else ""
            raise InvalidArgument(name, f"{value}{first['msg']}") from None


class SequencePolicies:
    """One policy at one size, resolved for sequences of any length.

    Raises InvalidArgument if the arguments do not describe one policy, and everything that
    `policies.parse` raises.
    """

    def __init__(self, given: Arguments, model: LoadedModel) -> None:
        try:
            found = policy_specs.parse(given.policy, model)
        except InvalidArgument as error:
            raise InvalidArgument("policy", error.problem) from None
        if len(found) != 1:
            raise InvalidArgument(
                "policy", f"{given.policy!r} is {len(found)} policies; accepted: one, as in a2sf:.9"
            )
        (named,) = found
        sizes = [size for size in (given.ratio, given.slots) if size is not None]
        if sizes and not named.has_size:
            raise InvalidArgument("policy", "full keeps every token; leave ratio and slots out")
        if len(sizes) > 1 or (not sizes and named.has_size and named.table is None):
            raise InvalidArgument(
                "ratio", f"policy {given.policy} takes one of ratio and slots; got {len(sizes)}"
            )
        size = Size(ratio=given.ratio, slots=given.slots) if sizes else None
        self.table: AlphaTable | None = named.table
        """The table that `requested_policy` names."""
        if named.slot_rule is not None:
            raise InvalidArgument(
                "policy",
                f"{given.policy!r} splits slots by a rule that no server has; compare it with "
                "python -m tuner evaluate",
            )
        if named.table is None:
            requested_policy = named.at(
                size, prefill_chunk=given.prefill_chunk or 0, seed=given.seed
            )
            assert isinstance(requested_policy, CachePolicy)
        else:
            requested_policy = CachePolicy(
                table=named.table.name,
                budget=given.slots,
                budget_ratio=given.ratio,
                # Policies are compared at equal bytes, so a minimum budget must not raise a ratio.
                min_budget=0,
                prefill_chunk=given.prefill_chunk,
            )
        self.requested_policy: CachePolicy = requested_policy
        """The cache policy for requests to the engine."""
        self._shape = model.shape
        self._resolved: dict[int, EffectivePolicy] = {}

    @property
    def full(self) -> bool:
        """Whether nothing is ever evicted."""
        return self.requested_policy.preset == "full"

    def at(self, length: int) -> EffectivePolicy:
        """Return the policy for a sequence of `length` tokens, by the rules of serving.

        Raises InvalidArgument if the budget is too small for the protected tokens.
        """
        if length not in self._resolved:
            try:
                self._resolved[length] = resolve(
                    self.requested_policy,
                    table=self.table,
                    server=CachePolicy(),
                    length=length,
                    # There is no slab yet that could limit the budget.
                    slots=sys.maxsize,
                    num_layers=self._shape.num_layers,
                    num_kv_heads=self._shape.num_kv_heads,
                )
            except InvalidArgument as error:
                problem = f"a sequence has {length} tokens; {error.problem}"
                raise InvalidArgument("policy", problem) from None
        return self._resolved[length]


def sampling(wanted: Mapping[str, Any], seed: int) -> Sampling:
    """Return the sampling for a task's generation arguments, without those that concern length.

    Raises InvalidArgument for arguments that the engine does not support, instead of ignoring them,
    and pydantic's ValidationError for values out of range.
    """
    filters = {name: wanted[name] for name in _SAMPLING if name in wanted}
    for name in wanted.keys() - filters.keys() - {"do_sample", "temperature"}:
        if wanted[name] != _WITHOUT_EFFECT.get(name):
            raise InvalidArgument(
                "gen_kwargs",
                f"{name}={wanted[name]!r}; accepted: until, max_gen_toks, do_sample, temperature, "
                f"{', '.join(_SAMPLING)}",
            )
    temperature = wanted.get("temperature", 0.0) if wanted.get("do_sample") else 0.0
    return Sampling(temperature=temperature, seed=seed, **filters)

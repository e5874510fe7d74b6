"""Parses policies from the command line, and resolves them at each size.

Owns the spelling: `full`, `window`, `h2o`, `tova_per_head`, `random`, `a2sf`, `pyramid`, `adakv`
and alpha tables, with their protected tokens. Knows nothing of examples or costs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a2sf.errors import InvalidArgument, did_you_mean
from a2sf.model.loader import LoadedModel
from a2sf.policy import DEFAULT_SINKS, PRESETS, CachePolicy
from a2sf.schema import AlphaTable
from a2sf.tablefile import load_table
from tuner.evaluation.objective import Candidate
from tuner.evaluation.results import Size
from tuner.evaluation.slot_rules import AdaKV, Pyramid
from tuner.options import shipped_tables, table_file

DEFAULT_RECENT = ".5"
"""Default protection of `a2sf`, `pyramid`, `adakv` and `random`: the same as of `h2o`, so that only
the scores differ."""

DEFAULT_A2SF = tuple(
    f"a2sf:{a}:{r}" for a in ("0", ".5", ".9", ".98", ".99", "1") for r in ("0", ".5")
)
"""Meaning of a bare `a2sf`: memory of 1, 2, 10, 50 and 100 tokens and infinite, with and without a
protected window, because each is informative only together with the other."""

SPELLING = (
    "full; window[:SINKS]; h2o[:SINKS]; tova_per_head, random, a2sf:ALPHA, pyramid[:ALPHA] or "
    "adakv[:ALPHA], each with [:RECENT[:SINKS]] after it, where RECENT is tokens (8) or, with a "
    f"point, a share of the rest (.5), by default {DEFAULT_RECENT}, but 0 for tova_per_head; a2sf, "
    f"for {len(DEFAULT_A2SF)} of them; or the file or shipped name of an alpha table"
)

_PARTS = {  # the parts that may follow a name
    "full": (),
    "window": ("sinks",),
    "h2o": ("sinks",),
    "tova_per_head": ("recent", "sinks"),
    "random": ("recent", "sinks"),
    "a2sf": ("alpha", "recent", "sinks"),
    "pyramid": ("alpha", "recent", "sinks"),
    "adakv": ("alpha", "recent", "sinks"),
}

_SLOT_RULES: dict[str, tuple[type[Pyramid] | type[AdaKV], str]] = {
    "pyramid": (Pyramid, "slots by layer as PyramidKV splits them"),
    "adakv": (AdaKV, "slots by head as AdaKV splits them at the end of each prompt"),
}
"""Rules that split the slots in other ways: the class, and a description."""


@dataclass(frozen=True)
class PolicySpec:
    """A policy without its size."""

    name: str
    requested_policy: CachePolicy
    table: AlphaTable | None = field(default=None, compare=False)
    slot_rule: str | None = None
    """The rule of `slot_rules` that splits the slots; None: equal slots, or those of the table."""

    @property
    def has_size(self) -> bool:
        """Whether the policy needs a size; `full` keeps everything."""
        return self.requested_policy.preset != "full"

    @property
    def fitted_at(self) -> Size | None:
        """The size that the policy's table was fitted at; None without a table."""
        if self.table is None:
            return None
        fitted = self.table.policy
        return Size(ratio=fitted.budget_ratio, slots=fitted.budget)

    @property
    def description(self) -> str:
        """The policy in words, for a reader of a report."""
        if self.table is not None:
            fitted = self.table.calibration
            return f"alpha table fitted on {fitted.examples} examples of {fitted.dataset}"
        requested_policy = self.requested_policy
        what = (
            f"uniform alpha {requested_policy.alpha:g}"
            if requested_policy.alpha is not None
            else f"preset {requested_policy.preset}"
        )
        if self.slot_rule is not None:
            what = f"{_SLOT_RULES[self.slot_rule][1]}, {what}"
        recent = (
            f"recent {requested_policy.recent_share:g} of the rest"
            if requested_policy.recent_share is not None
            else f"recent {requested_policy.recent}"
        )
        fixed_recent = requested_policy.preset in ("full", "window", "h2o")
        parts = [
            what,
            *([] if fixed_recent else [recent]),
            *([f"sinks {requested_policy.sinks}"] if self.has_size else []),
        ]
        return ", ".join(parts)

    def at(self, size: Size | None, *, prefill_chunk: int, seed: int) -> Candidate:
        """Return the policy at a size; a table keeps everything except its budget.

        Args:
            size: None for `full` only.
            prefill_chunk: for policies that set none; a table sets its own.
            seed: of the random baseline.
        """
        budget = {} if size is None else {"budget": size.slots, "budget_ratio": size.ratio}
        if self.table is not None:
            return self.table.policy.model_copy(update=budget)
        update = {**budget, "prefill_chunk": prefill_chunk}
        if self.requested_policy.preset == "random":
            update["random_seed"] = seed
        requested_policy = self.requested_policy.model_copy(update=update)
        return (
            requested_policy
            if self.slot_rule is None
            else _SLOT_RULES[self.slot_rule][0](equal=requested_policy)
        )


def parse(written: str, model: LoadedModel) -> list[PolicySpec]:
    """Read a list of policies, with commas between them.

    Raises InvalidArgument for a policy that cannot be read or is given twice, NotFound for a
    missing file, and TableError for a table of another model.
    """
    given = [one.strip() for one in written.split(",") if one.strip()]
    for one in given:
        if given.count(one) > 1:
            raise InvalidArgument("--policies", f"{one!r} is given twice")
    found = [policy for one in given for policy in _read(one, model)]
    if not found:
        raise InvalidArgument("--policies", f"none given; accepted: {SPELLING}")
    names = [policy.name for policy in found]
    for name in names:
        if names.count(name) > 1:
            if name in DEFAULT_A2SF and name in given:
                raise InvalidArgument(
                    "--policies",
                    f"'a2sf' stands for several settings and contains {name!r}; leave out one of "
                    "the two",
                )
            raise InvalidArgument("--policies", f"{name!r} is given twice")
    return found


def _read(written: str, model: LoadedModel) -> list[PolicySpec]:
    name, *values = written.split(":")
    if name in _PARTS and not Path(written).is_file():
        if written == "a2sf":
            return [policy for one in DEFAULT_A2SF for policy in _read(one, model)]
        if len(values) > len(_PARTS[name]):
            raise InvalidArgument("--policies", f"{written!r}; accepted: {SPELLING}")
        requested_policy = _requested_policy(name, dict(zip(_PARTS[name], values, strict=False)))
        return [
            PolicySpec(written, requested_policy, slot_rule=name if name in _SLOT_RULES else None)
        ]
    known = [*_PARTS, *shipped_tables()]
    if written not in known and not written.endswith(".json") and not Path(written).is_file():
        near = did_you_mean(name, known)
        raise InvalidArgument("--policies", f"{written!r}; accepted: {SPELLING}{near}")
    table = load_table(table_file(written, "--policies"), model.identity)
    return [PolicySpec(table.name, CachePolicy(table=table.name), table)]


def _requested_policy(name: str, parts: dict[str, str]) -> CachePolicy:
    fields: dict[str, Any] = {}
    if name in PRESETS:
        fields["preset"] = name
    if name != "full":
        fields["sinks"] = _number(parts["sinks"], int) if "sinks" in parts else DEFAULT_SINKS
    if "alpha" in _PARTS[name]:
        fields["alpha"] = _number(parts.get("alpha", "1"), float)
    if "recent" in _PARTS[name]:
        written = parts.get("recent", "0" if name == "tova_per_head" else DEFAULT_RECENT)
        if "." in written:
            fields["recent_share"] = _number(written, float)
        else:
            fields["recent"] = _number(written, int)
    return CachePolicy(**fields)


def _number(written: str, kind: type[int] | type[float]) -> float:
    """Read a number in the range of all values here: shares, alphas, tokens."""
    try:
        value = kind(written)
    except ValueError:
        raise InvalidArgument("--policies", f"{written!r} is not a number") from None
    if not 0 <= value <= (1 if kind is float else 2**31):
        raise InvalidArgument("--policies", f"{written}; accepted: 0 to 1, or whole tokens")
    return value

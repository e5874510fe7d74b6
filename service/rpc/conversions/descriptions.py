"""Describes the model and the alpha tables as messages.

Owns the typed fields of a table, and each head's budget in it. Knows nothing of completions.
"""

import math
from collections.abc import Mapping

from google.protobuf.timestamp_pb2 import Timestamp

from a2sf import __version__
from a2sf.cache.budgets import resolve
from a2sf.errors import InvalidArgument, TableError
from a2sf.policy import CachePolicy, Heads
from a2sf.schema import AlphaTable, ModelIdentity
from a2sf.tablefile import canonical_json
from a2sf.text import chat_template
from service.backend.default_table import default_policy
from service.backend.loading import Core
from service.backend.tables import TableStore
from service.config.options import ServerOptions
from service.pb import inference_pb2 as pb
from service.policy_messages import head_messages, layer_means, policy_to_message


def model_message(core: Core, options: ServerOptions) -> pb.GetModelResponse:
    """Describe the model and the server's sizes."""
    shape, config = core.model.shape, core.config
    slots = config.head_slots(shape.num_layers, core.model.identity.num_kv_heads)
    policy = default_policy(config, core.tables.now)
    return pb.GetModelResponse(
        model=identity_message(core.model.identity),
        max_context=shape.max_context,
        vocab_size=shape.vocab_size,
        head_dim=shape.head_dim,
        dtype=core.model.dtype_name,
        device=core.model.device.type,
        slots=config.slots,
        layer_slots=layer_means(slots),
        head_slots=head_messages(slots),
        max_prefill_tokens=config.staging_slots(shape.max_context),
        chat=chat_template.has_template(core.model.tokenizer),
        max_batch=config.max_batch,
        max_waiting=config.max_waiting,
        max_prompt_bytes=options.max_prompt_bytes,
        kv_slab_bytes=core.engine.kv_slab_bytes,
        default_cache_policy=policy_to_message(policy),
        server_version=__version__,
    )


def identity_message(identity: ModelIdentity) -> pb.ModelIdentity:
    """Convert a model's identity."""
    return pb.ModelIdentity(**identity.model_dump())


def table_list_message(store: TableStore) -> pb.ListAlphaTablesResponse:
    """Convert the list of tables."""
    return pb.ListAlphaTablesResponse(
        tables=[_summary(table) for table in store.tables.values()],
        refused=refused_messages(store.refused),
        default_table=store.default or "",
        etag=store.etag,
    )


def refused_messages(refused: Mapping[str, TableError]) -> list[pb.RefusedAlphaTable]:
    """Convert the reasons of refused files, by name."""
    return [pb.RefusedAlphaTable(name=name, reason=str(why)) for name, why in refused.items()]


def table_message(table: AlphaTable) -> pb.GetAlphaTableResponse:
    """Convert one table, to typed fields and to the canonical JSON of its file."""
    shares = table.policy.head_share
    policy = table.policy.model_dump(exclude={"alpha", "head_share"}, exclude_none=True)
    return pb.GetAlphaTableResponse(
        table=pb.AlphaTable(
            summary=_summary(table),
            model=identity_message(table.model),
            layers=[pb.LayerAlphas(alphas=row) for row in table.policy.alpha],
            layer_share=[math.fsum(row) / len(row) for row in shares],
            head_share=[pb.HeadShares(shares=row) for row in shares],
            head_budgets=head_messages(_budgets(table)),
            **policy,
        ),
        canonical_json=canonical_json(table.model_dump(mode="json")),
    )


def _budgets(table: AlphaTable) -> Heads:
    """Return each head's budget for a sequence so long that no head can keep all of it.

    Empty if the table's budget is a ratio, or if no request can be served with the table's own
    budget because it has no room for the tokens that the table protects.
    """
    if table.policy.budget is None:
        return ()
    identity = table.model
    most = table.policy.budget * identity.num_layers * identity.num_kv_heads + 1
    try:
        return resolve(
            CachePolicy(),
            table=table,
            server=CachePolicy(table=table.name),
            length=most,
            slots=most,
            num_layers=identity.num_layers,
            num_kv_heads=identity.num_kv_heads,
        ).head_budgets
    except InvalidArgument:
        return ()


def _summary(table: AlphaTable) -> pb.AlphaTableSummary:
    created_at = Timestamp()
    created_at.FromDatetime(table.created_at)
    return pb.AlphaTableSummary(
        name=table.name,
        sha256=table.sha256,
        dataset=table.calibration.dataset,
        verdict=pb.TableVerdict.Value(f"TABLE_VERDICT_{table.evidence.verdict.upper()}"),
        created_at=created_at,
    )

import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CachePreset(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_PRESET_UNSPECIFIED: _ClassVar[CachePreset]
    CACHE_PRESET_FULL: _ClassVar[CachePreset]
    CACHE_PRESET_WINDOW: _ClassVar[CachePreset]
    CACHE_PRESET_H2O: _ClassVar[CachePreset]
    CACHE_PRESET_TOVA_PER_HEAD: _ClassVar[CachePreset]
    CACHE_PRESET_RANDOM: _ClassVar[CachePreset]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_END_OF_SEQUENCE: _ClassVar[FinishReason]

class TableVerdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TABLE_VERDICT_UNSPECIFIED: _ClassVar[TableVerdict]
    TABLE_VERDICT_BETTER: _ClassVar[TableVerdict]
    TABLE_VERDICT_NO_BETTER_THAN_UNIFORM: _ClassVar[TableVerdict]
CACHE_PRESET_UNSPECIFIED: CachePreset
CACHE_PRESET_FULL: CachePreset
CACHE_PRESET_WINDOW: CachePreset
CACHE_PRESET_H2O: CachePreset
CACHE_PRESET_TOVA_PER_HEAD: CachePreset
CACHE_PRESET_RANDOM: CachePreset
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_END_OF_SEQUENCE: FinishReason
TABLE_VERDICT_UNSPECIFIED: TableVerdict
TABLE_VERDICT_BETTER: TableVerdict
TABLE_VERDICT_NO_BETTER_THAN_UNIFORM: TableVerdict

class StreamGenerateRequest(_message.Message):
    __slots__ = ("input",)
    INPUT_FIELD_NUMBER: _ClassVar[int]
    input: GenerationInput
    def __init__(self, input: _Optional[_Union[GenerationInput, _Mapping]] = ...) -> None: ...

class StreamGenerateResponse(_message.Message):
    __slots__ = ("started", "delta", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: GenerationStarted
    delta: GenerationDelta
    finished: GenerationFinished
    def __init__(self, started: _Optional[_Union[GenerationStarted, _Mapping]] = ..., delta: _Optional[_Union[GenerationDelta, _Mapping]] = ..., finished: _Optional[_Union[GenerationFinished, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("input",)
    INPUT_FIELD_NUMBER: _ClassVar[int]
    input: GenerationInput
    def __init__(self, input: _Optional[_Union[GenerationInput, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "text", "token_ids", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: GenerationStarted
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finished: GenerationFinished
    def __init__(self, started: _Optional[_Union[GenerationStarted, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., finished: _Optional[_Union[GenerationFinished, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "max_context", "vocab_size", "head_dim", "dtype", "device", "slots", "max_batch", "kv_slab_bytes", "default_cache_policy", "server_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    KV_SLAB_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_CACHE_POLICY_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: ModelIdentity
    max_context: int
    vocab_size: int
    head_dim: int
    dtype: str
    device: str
    slots: int
    max_batch: int
    kv_slab_bytes: int
    default_cache_policy: CachePolicy
    server_version: str
    def __init__(self, model: _Optional[_Union[ModelIdentity, _Mapping]] = ..., max_context: _Optional[int] = ..., vocab_size: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., slots: _Optional[int] = ..., max_batch: _Optional[int] = ..., kv_slab_bytes: _Optional[int] = ..., default_cache_policy: _Optional[_Union[CachePolicy, _Mapping]] = ..., server_version: _Optional[str] = ...) -> None: ...

class ListAlphaTablesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAlphaTablesResponse(_message.Message):
    __slots__ = ("tables", "refused")
    TABLES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[AlphaTableSummary]
    refused: _containers.RepeatedCompositeFieldContainer[RefusedAlphaTable]
    def __init__(self, tables: _Optional[_Iterable[_Union[AlphaTableSummary, _Mapping]]] = ..., refused: _Optional[_Iterable[_Union[RefusedAlphaTable, _Mapping]]] = ...) -> None: ...

class GetAlphaTableRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetAlphaTableResponse(_message.Message):
    __slots__ = ("table", "canonical_json")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CANONICAL_JSON_FIELD_NUMBER: _ClassVar[int]
    table: AlphaTable
    canonical_json: str
    def __init__(self, table: _Optional[_Union[AlphaTable, _Mapping]] = ..., canonical_json: _Optional[str] = ...) -> None: ...

class GenerationInput(_message.Message):
    __slots__ = ("request_id", "text", "token_ids", "max_new_tokens", "sampling", "stop", "stop_token_ids", "ignore_eos", "cache_policy", "output")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    CACHE_POLICY_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    token_ids: TokenIds
    max_new_tokens: int
    sampling: Sampling
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    cache_policy: CachePolicy
    output: OutputOptions
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., cache_policy: _Optional[_Union[CachePolicy, _Mapping]] = ..., output: _Optional[_Union[OutputOptions, _Mapping]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class OutputOptions(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: bool
    def __init__(self, token_ids: _Optional[bool] = ...) -> None: ...

class CachePolicy(_message.Message):
    __slots__ = ("table", "alpha", "preset", "budget", "budget_ratio", "recent", "recent_share", "sinks", "prefill_chunk", "random_seed")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    BUDGET_RATIO_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    RECENT_SHARE_FIELD_NUMBER: _ClassVar[int]
    SINKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CHUNK_FIELD_NUMBER: _ClassVar[int]
    RANDOM_SEED_FIELD_NUMBER: _ClassVar[int]
    table: str
    alpha: float
    preset: CachePreset
    budget: int
    budget_ratio: float
    recent: int
    recent_share: float
    sinks: int
    prefill_chunk: int
    random_seed: int
    def __init__(self, table: _Optional[str] = ..., alpha: _Optional[float] = ..., preset: _Optional[_Union[CachePreset, str]] = ..., budget: _Optional[int] = ..., budget_ratio: _Optional[float] = ..., recent: _Optional[int] = ..., recent_share: _Optional[float] = ..., sinks: _Optional[int] = ..., prefill_chunk: _Optional[int] = ..., random_seed: _Optional[int] = ...) -> None: ...

class GenerationStarted(_message.Message):
    __slots__ = ("request_id", "cache_policy", "prompt_tokens", "seed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_POLICY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    cache_policy: EffectiveCachePolicy
    prompt_tokens: int
    seed: int
    def __init__(self, request_id: _Optional[str] = ..., cache_policy: _Optional[_Union[EffectiveCachePolicy, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class EffectiveCachePolicy(_message.Message):
    __slots__ = ("table", "alpha", "preset", "budget", "recent", "sinks", "prefill_chunk", "random_seed")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    SINKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CHUNK_FIELD_NUMBER: _ClassVar[int]
    RANDOM_SEED_FIELD_NUMBER: _ClassVar[int]
    table: AlphaTableReference
    alpha: float
    preset: CachePreset
    budget: int
    recent: int
    sinks: int
    prefill_chunk: int
    random_seed: int
    def __init__(self, table: _Optional[_Union[AlphaTableReference, _Mapping]] = ..., alpha: _Optional[float] = ..., preset: _Optional[_Union[CachePreset, str]] = ..., budget: _Optional[int] = ..., recent: _Optional[int] = ..., sinks: _Optional[int] = ..., prefill_chunk: _Optional[int] = ..., random_seed: _Optional[int] = ...) -> None: ...

class AlphaTableReference(_message.Message):
    __slots__ = ("name", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class GenerationDelta(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerationFinished(_message.Message):
    __slots__ = ("reason", "matched_stop", "usage", "cache", "timings")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    matched_stop: str
    usage: Usage
    cache: CacheStatistics
    timings: Timings
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., matched_stop: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., cache: _Optional[_Union[CacheStatistics, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class CacheStatistics(_message.Message):
    __slots__ = ("budget", "kept_tokens", "evicted_tokens", "kv_bytes", "kv_bytes_full")
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FULL_FIELD_NUMBER: _ClassVar[int]
    budget: int
    kept_tokens: int
    evicted_tokens: int
    kv_bytes: int
    kv_bytes_full: int
    def __init__(self, budget: _Optional[int] = ..., kept_tokens: _Optional[int] = ..., evicted_tokens: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., kv_bytes_full: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_seconds", "prefill_seconds", "decode_seconds")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    def __init__(self, queue_seconds: _Optional[float] = ..., prefill_seconds: _Optional[float] = ..., decode_seconds: _Optional[float] = ...) -> None: ...

class ModelIdentity(_message.Message):
    __slots__ = ("id", "revision", "architecture", "num_layers", "num_attention_heads", "num_kv_heads", "fingerprint")
    ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTENTION_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    id: str
    revision: str
    architecture: str
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    fingerprint: str
    def __init__(self, id: _Optional[str] = ..., revision: _Optional[str] = ..., architecture: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_attention_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class AlphaTableSummary(_message.Message):
    __slots__ = ("name", "sha256", "dataset", "verdict", "created_at")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    dataset: str
    verdict: TableVerdict
    created_at: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., dataset: _Optional[str] = ..., verdict: _Optional[_Union[TableVerdict, str]] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class RefusedAlphaTable(_message.Message):
    __slots__ = ("name", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class AlphaTable(_message.Message):
    __slots__ = ("summary", "model", "layers", "budget", "budget_ratio", "recent", "recent_share", "sinks", "prefill_chunk")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    BUDGET_RATIO_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    RECENT_SHARE_FIELD_NUMBER: _ClassVar[int]
    SINKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CHUNK_FIELD_NUMBER: _ClassVar[int]
    summary: AlphaTableSummary
    model: ModelIdentity
    layers: _containers.RepeatedCompositeFieldContainer[LayerAlphas]
    budget: int
    budget_ratio: float
    recent: int
    recent_share: float
    sinks: int
    prefill_chunk: int
    def __init__(self, summary: _Optional[_Union[AlphaTableSummary, _Mapping]] = ..., model: _Optional[_Union[ModelIdentity, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerAlphas, _Mapping]]] = ..., budget: _Optional[int] = ..., budget_ratio: _Optional[float] = ..., recent: _Optional[int] = ..., recent_share: _Optional[float] = ..., sinks: _Optional[int] = ..., prefill_chunk: _Optional[int] = ...) -> None: ...

class LayerAlphas(_message.Message):
    __slots__ = ("alphas",)
    ALPHAS_FIELD_NUMBER: _ClassVar[int]
    alphas: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, alphas: _Optional[_Iterable[float]] = ...) -> None: ...

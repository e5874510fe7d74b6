"""The seam with transformers: loading models and plugging in attention.

Owns loading, a model's identity, and the registered attention function; what settings say by
themselves is read in `outline`. A caller hands every forward pass a `LayerAttention`, which
transformers carries to each layer as a keyword argument; nothing is patched and no state hangs on a
module. Knows nothing of requests or schedules, and nothing of any one family.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GenerationConfig,
)
from transformers.distributed import DistributedConfig

from a2sf import dtypes, families, files, gguf_file, linear, span
from a2sf.errors import InvalidArgument, NotFound, Unsupported, one_line
from a2sf.files import REFERENCE
from a2sf.fingerprint import BYTES_A_WEIGHT, canonical_rotation, fingerprints, key_starts
from a2sf.outline import (
    ModelShape,
    check_generation_settings,
    empty_module,
    read_headers,
    read_settings,
    read_tokenizer,
    reading,
    shape_of,
)
from a2sf.ranks import Ranks, expected, of_own_heads
from a2sf.schema import LoadedIdentity, ModelIdentity

ATTENTION_NAME = "a2sf"
"""Of our attention function, as transformers knows it: it hands on to a `LayerAttention`."""


class LayerAttention(Protocol):
    """What a forward pass does in the place of attention."""

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, /
    ) -> Tensor:
        """Attend in one layer.

        Args:
            layer: the layer's index.
            query: [rows, H_q, width, D], rotated.
            keys, values: [rows, H_kv, width, D], the keys rotated.
            scale: factor on the logits.

        Returns:
            The attention output, [rows, H_q, width, D].
        """
        ...


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layer_attention: LayerAttention,
    **arguments: Any,
) -> tuple[Tensor, None]:
    assert attention_mask is None, "masks come from positions; transformers makes none for us"
    layer_index = module.layer_idx
    assert isinstance(layer_index, int)
    families.refuse_effects(layer_index, module.config, arguments)
    output = layer_attention(layer_index, query, key, value, scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with its tokenizer and its identity."""

    identity: ModelIdentity
    """Of the whole model, whoever holds it."""
    shape: ModelShape
    """Of what this process holds: where ranks share the model, its heads are this rank's."""
    module: Any
    """The transformers model, in evaluation mode; its linear layers may be packed."""
    tokenizer: Any
    """The transformers fast tokenizer."""
    device: torch.device
    dtype: torch.dtype
    eos_token_ids: frozenset[int]
    held: tuple[int, int] | None = None
    """The KV heads of each layer that this process holds, from the first up to the second, and the
    query heads that share them; None: all."""
    dtype_reason: str = "asked for"
    """Why this dtype, for people to read."""

    @property
    def dtype_name(self) -> str:
        """The dtype as people write it, such as `bfloat16`."""
        return dtypes.name(self.dtype)

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Turn text into token ids, with the beginning-of-sequence token if the model has one.

        Special tokens that the text spells out are read as such. One that is the beginning of the
        sequence already gets no second one. Without `special` none is added: a chat template has
        written it into the text already.
        """
        ids = self._encode(text, special=special)
        begin = self.tokenizer.bos_token_id
        if special and ids[:2] == (begin, begin):
            # One of the two may be the text's, or both.
            own = self._encode(text, special=False)
            if own[:1] == (begin,) and ids[1 : 1 + len(own)] == own:
                return ids[1:]
        return ids

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        # Not verbose: who asks has an answer of their own for texts beyond the model's context.
        encoded = self.tokenizer(text, verbose=False, add_special_tokens=special)
        return tuple(encoded.input_ids)

    def hidden_states(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: LayerAttention,
        entering: tuple[int, Tensor] | None = None,
        *,
        differentiable: bool = False,
    ) -> Tensor:
        """Run the layers with `attention` in each, from [rows, width] ids and positions.

        `entering` says what enters a layer, as `layer_input` gave it; those below are not run.
        `differentiable` asks for gradients with respect to what `attention` returns, for which the
        model must have been loaded with `pack=False`.
        Returns [rows, width, hidden], normalised and ready for `logits`.
        """
        # torch would only warn, and give gradients that leave out what those layers pass on.
        packed = any(isinstance(part, linear.PackedLinear) for part in self.module.modules())
        assert not (differentiable and packed), "load the model with pack=False"
        with torch.inference_mode(not differentiable):
            if self.held is not None:
                attention = of_own_heads(attention, self.held)
            hidden: Tensor = _decode(
                self._decoder(entering), token_ids, positions, attention
            ).last_hidden_state
        return hidden

    @torch.inference_mode()
    def layer_input(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: LayerAttention,
        layer: int,
        entering: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Run the layers below `layer` only; return what enters it, [rows, width, hidden]."""
        decoder, noted = span.up_to_layer(self._decoder(entering), layer)
        _decode(decoder, token_ids, positions, attention)
        assert noted.entered is not None
        return noted.entered

    def _decoder(self, entering: tuple[int, Tensor] | None) -> Any:
        decoder = self.module.get_decoder()
        if entering is None or entering[0] == 0:
            return decoder
        return span.from_layer(decoder, *entering)

    def logits(self, hidden: Tensor, *, differentiable: bool = False) -> Tensor:
        """Project hidden states [..., hidden] onto the vocabulary: [..., vocab], same dtype."""
        with torch.inference_mode(not differentiable):
            projected: Tensor = self.module.get_output_embeddings()(hidden)
        return projected


def _decode(decoder: Any, token_ids: Tensor, positions: Tensor, attention: LayerAttention) -> Any:
    return decoder(
        input_ids=token_ids, position_ids=positions, use_cache=False, layer_attention=attention
    )


def load_model(
    id_or_path: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    pack: bool = True,
    ranks: Ranks | None = None,
) -> LoadedModel:
    """Load a model with its tokenizer, from safetensors or GGUF and without remote code.

    Args:
        id_or_path: "reference" for the packaged model, a directory, a GGUF file, or a hub id.
        revision: branch, tag or commit, for a hub id.
        device: "auto" (CUDA where there is one, else the processor), "cpu", "cuda" or "cuda:N".
        dtype: "auto", for which `dtypes.choose` has the rule, or a name such as "bfloat16".
        pack: whether to lay the weights out as a processor multiplies them fastest; gradients do
            not flow through such layers, so that who wants them asks for False.
        ranks: the processes among which the model's heads are divided, all of which call this;
            each computes where its rank says, and packs nothing. None: this process holds all.

    Raises:
        NotFound: there is no such model, or it cannot be reached.
        Unsupported: the model is of a kind that this program would run wrongly, or torchrun has
            started several processes that are not to share it.
        InvalidArgument: device or dtype is not one of those above, or heads cannot be divided.
    """
    if ranks is None and expected() > 1:
        raise Unsupported(
            "this program does not divide a model among the processes that torchrun has started; "
            "start it without torchrun"
        )
    target = ranks.device if ranks else _device(device)
    dtypes.check(dtype)
    gguf = gguf_file.open_model(id_or_path)
    if gguf is not None and ranks:
        raise Unsupported(
            f"model {id_or_path!r} is a GGUF file, which is not divided among processes; supported "
            "there: *.safetensors"
        )
    directory = gguf.header.path.parent if gguf else files.directory(id_or_path, revision)
    config = read_settings(id_or_path, directory, gguf)
    choice = dtypes.choose(dtype, target.type, config, processes=ranks.size if ranks else 1)
    chosen = choice.dtype
    shape = shape_of(config)
    # What is wrong with the files is said before weights are read.
    if gguf:
        vocabulary = gguf.vocabulary()
        tokenizer, ends = vocabulary.tokenizer(), vocabulary.end_ids()
        # Mixed quantisations differ in other tensors than the key projections.
        starts, stored = gguf.key_starts(BYTES_A_WEIGHT), {"stored": gguf.header.type_counts()}
        identity = _identity(gguf.id, revision, config, starts, stored)
    else:
        empty = empty_module(id_or_path, config, chosen)
        starts = key_starts(read_headers(id_or_path, directory, config, empty))
        tokenizer = read_tokenizer(id_or_path, directory, config)
        check_generation_settings(id_or_path, directory)
        ends = _eos_token_ids(directory, config, tokenizer)
        # A local model goes by its folder's name: the path to it is nobody else's business.
        local = id_or_path != REFERENCE and Path(id_or_path).is_dir()
        name = directory.resolve().name if local else id_or_path
        identity = _identity(name, revision, config, starts)
    held = None
    if ranks:
        held = ranks.share(shape.num_kv_heads)
        shape = replace(
            shape,
            num_attention_heads=shape.num_attention_heads // ranks.size,
            num_kv_heads=shape.num_kv_heads // ranks.size,
        )
    with reading(id_or_path, "weights"):
        if gguf:
            module, loaded = gguf.load(chosen, attn_implementation=ATTENTION_NAME)
        else:
            module, loaded = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=chosen,
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **_divided(id_or_path, config) if ranks else {},
            )
    # transformers fills what is missing with random numbers and only warns.
    for kind in ("missing", "unexpected", "mismatched"):
        if loaded[f"{kind}_keys"]:
            raise NotFound(
                f"model {id_or_path!r}: weights are {kind}: "
                f"{', '.join(sorted(map(str, loaded[f'{kind}_keys'])))}"
            )
    module = module.to(target).eval().requires_grad_(False)
    # A packed layer would leave out the sum over ranks that transformers hooks to it.
    if pack and not ranks:
        linear.pack(module)
    model = LoadedModel(
        identity=identity,
        shape=shape,
        module=module,
        tokenizer=tokenizer,
        device=target,
        dtype=chosen,
        eos_token_ids=ends,
        held=held,
        dtype_reason=choice.reason,
    )
    try:
        _try_out(model)
    except Unsupported as error:
        raise Unsupported(f"model {id_or_path!r}: {error}") from error
    except RuntimeError as error:
        raise Unsupported(
            f"model {id_or_path!r} cannot read a token ({one_line(error)})"
        ) from error
    return model


def _identity(
    name: str,
    revision: str | None,
    config: Any,
    starts: Mapping[int, bytes],
    stored: Mapping[str, Any] = MappingProxyType({}),
) -> LoadedIdentity:
    """Return a model's identity; `stored` is hashed beside the settings, where there is any."""
    shape, architecture = shape_of(config), config.architectures[0]
    partial = architecture in families.ROTATE_IN_PART
    sizes = {"head_dim": shape.head_dim, "hidden_size": config.hidden_size}
    sizes["vocab_size"] = shape.vocab_size
    rope = canonical_rotation(config.rope_parameters, shape.max_context, partial=partial)
    fingerprint, *earlier = fingerprints(
        {
            "architecture": architecture,
            "num_layers": shape.num_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_kv_heads": shape.num_kv_heads,
            **sizes,
            **stored,
        },
        config.rope_parameters,
        starts,
        num_layers=shape.num_layers,
        max_context=shape.max_context,
        partial=partial,
    )
    return LoadedIdentity(
        id=name,
        revision=revision,
        architecture=architecture,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_kv_heads,
        fingerprint=fingerprint,
        earlier=tuple(earlier),
        settings=", ".join(f"{name} {value}" for name, value in {**sizes, **rope}.items()),
    )


def _divided(name: str, config: Any) -> dict[str, DistributedConfig]:
    """Return what asks transformers to divide the model among the ranks by the model's own plan.

    Raises Unsupported where that plan does not have each process project its own heads' output.
    """
    plan = config.base_model_tp_plan or {}
    outputs = [how for part, how in plan.items() if re.search(r"self_attn\.(o_proj|dense)$", part)]
    if not outputs or not set(outputs) <= {"rowwise", "rowwise_split_input"}:
        raise Unsupported(
            f"model {name!r} is a {config.architectures[0]}, of which transformers has no "
            "tensor-parallel plan that divides the heads; serve it with one process"
        )
    if find_spec("accelerate") is None:
        raise Unsupported("a model is divided with accelerate; install a2sf-serve[parallel]")
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def _try_out(model: LoadedModel) -> None:
    """Run one token, so that a layer that asks for too much is refused before anyone waits."""
    shape = model.shape
    attended = []

    def attend(layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        assert query.shape == (1, shape.num_attention_heads, 1, shape.head_dim)
        assert keys.shape == values.shape == (1, shape.num_kv_heads, 1, shape.head_dim)
        attended.append(layer)
        return query

    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model.hidden_states(token, token, attend)
    assert attended == list(range(shape.num_layers)), "each layer attends once, in order"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InvalidArgument("device", f"{name!r}; accepted: auto, cpu, cuda, cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidArgument("device", f"{name!r}, but this machine has no CUDA device; use cpu")
    return torch.device(name)


def _eos_token_ids(directory: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the ends of sequence that settings, generation settings and tokenizer name."""
    named = [config.eos_token_id, tokenizer.eos_token_id]
    if (directory / "generation_config.json").is_file():
        named.append(GenerationConfig.from_pretrained(directory).eos_token_id)
    found: set[int] = set()
    for ids in named:
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    # Some settings say with a negative number that there is none.
    return frozenset(index for index in found if index >= 0)

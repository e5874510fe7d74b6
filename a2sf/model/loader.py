"""Loads a model with transformers, and runs its layers.

Owns `load_model`, and `LoadedModel` with its forward passes; `spec` reads the settings. Knows
nothing of requests or schedules, and nothing of a particular family.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from a2sf.errors import InvalidArgument, NotFound, Unsupported, one_line
from a2sf.model import dtypes, families, gguf_file, linear, locate, partial_decoder
from a2sf.model.fingerprint import BYTES_A_WEIGHT, key_starts
from a2sf.model.identity import identity_of
from a2sf.model.layer_attention import ATTENTION_NAME, LayerAttention, for_local_heads
from a2sf.model.spec import (
    ModelShape,
    check_generation_settings,
    empty_module,
    read_eos_token_ids,
    read_headers,
    read_settings,
    read_tokenizer,
    reading,
    shape_of,
)
from a2sf.model.tensor_parallel import Ranks, num_processes
from a2sf.policy import Heads
from a2sf.schema import ModelIdentity


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with its tokenizer and its identity."""

    identity: ModelIdentity
    """The identity of the whole model, even if several processes share it."""
    shape: ModelShape
    """The sizes in this process: if ranks share the model, it counts only this rank's heads."""
    module: Any
    """The transformers model, in evaluation mode; on processors with `linear.ProcessorLinear`."""
    tokenizer: Any
    """The transformers fast tokenizer."""
    device: torch.device
    dtype: torch.dtype
    eos_token_ids: frozenset[int]
    local_heads: tuple[int, int] | None = None
    """(first, end): this process holds the KV heads first .. end - 1 of each layer, and their query
    heads. None: all heads."""
    dtype_reason: str = "asked for"
    """The reason for this dtype, for people to read."""

    @property
    def heads(self) -> slice:
        """The KV heads of this process, among all heads of a layer."""
        return slice(None) if self.local_heads is None else slice(*self.local_heads)

    def select_heads(self, rows: Heads) -> Heads:
        """Return the numbers of this process's heads, of [num_layers][num_kv_heads] numbers."""
        return tuple(row[self.heads] for row in rows)

    @property
    def dtype_name(self) -> str:
        """The name of the dtype, such as `bfloat16`."""
        return dtypes.name(self.dtype)

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Encode text to token ids, with the beginning-of-sequence token if the model has one.

        Special tokens that the text spells out are encoded as special tokens. A text that already
        starts with the beginning-of-sequence token gets no second one. Without `special`, none is
        added; use this for the output of a chat template, which already has it.
        """
        ids = self._encode(text, special=special)
        begin = self.tokenizer.bos_token_id
        if special and ids[:2] == (begin, begin):
            # The text may have spelled out one of the two, or both.
            own = self._encode(text, special=False)
            if own[:1] == (begin,) and ids[1 : 1 + len(own)] == own:
                return ids[1:]
        return ids

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        # verbose=False: callers report texts that are longer than the model's context themselves.
        encoded = self.tokenizer(text, verbose=False, add_special_tokens=special)
        return tuple(encoded.input_ids)

    def hidden_states(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: LayerAttention,
        layer_input: tuple[int, Tensor] | None = None,
        *,
        differentiable: bool = False,
    ) -> Tensor:
        """Run the layers with `attention` in each.

        Args:
            token_ids, positions: [rows, width] integer.
            attention: computes the attention of every layer.
            layer_input: a layer's index and its input, from `compute_layer_input`. The layers below
                it are not run.
            differentiable: whether gradients flow to the results of `attention`.

        Returns:
            [rows, width, hidden], after the final norm, for `logits`.
        """
        with torch.inference_mode(not differentiable):
            if self.local_heads is not None:
                attention = for_local_heads(attention, self.local_heads)
            hidden: Tensor = _decode(
                self._decoder(layer_input), token_ids, positions, attention
            ).last_hidden_state
        return hidden

    @torch.inference_mode()
    def compute_layer_input(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: LayerAttention,
        layer: int,
        layer_input: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Run only the layers below `layer`; return the layer's input, [rows, width, hidden]."""
        decoder, placeholder = partial_decoder.up_to_layer(self._decoder(layer_input), layer)
        _decode(decoder, token_ids, positions, attention)
        assert placeholder.input is not None
        return placeholder.input

    def _decoder(self, layer_input: tuple[int, Tensor] | None) -> Any:
        decoder = self.module.get_decoder()
        if layer_input is None or layer_input[0] == 0:
            return decoder
        return partial_decoder.from_layer(decoder, *layer_input)

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
    ranks: Ranks | None = None,
) -> LoadedModel:
    """Load a model with its tokenizer, from safetensors or GGUF, without remote code.

    Args:
        id_or_path: "reference" for the packaged model, a directory, a GGUF file, or a hub id.
        revision: branch, tag or commit, for a hub id.
        device: "auto" (CUDA if available, else the processor), "cpu", "cuda" or "cuda:N".
        dtype: "auto", see `dtypes.choose`, or a name such as "bfloat16".
        ranks: the processes that share the model's heads; all of them must call this function.
            Each uses its rank's device. None: one process holds all.

    Raises:
        NotFound: there is no such model, or it cannot be reached.
        Unsupported: this program would run the model wrongly, or torchrun has started several
            processes that do not share it.
        InvalidArgument: device or dtype is not one of those above, or heads cannot be divided.
    """
    if ranks is None and num_processes() > 1:
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
    directory = gguf.header.path.parent if gguf else locate.directory(id_or_path, revision)
    config = read_settings(id_or_path, directory, gguf)
    choice = dtypes.choose(dtype, target.type, config, processes=ranks.size if ranks else 1)
    chosen = choice.dtype
    shape = shape_of(config)
    # Check the files before reading weights.
    if gguf:
        vocabulary = gguf.vocabulary()
        tokenizer, ends = vocabulary.tokenizer(), vocabulary.end_ids()
        # Mixed quantisations may differ only outside the key projections, so hash all types.
        starts, stored = gguf.key_starts(BYTES_A_WEIGHT), {"stored": gguf.header.type_counts()}
        identity = identity_of(gguf.id, revision, config, starts, stored)
    else:
        empty = empty_module(id_or_path, config, chosen)
        starts = key_starts(read_headers(id_or_path, directory, config, empty))
        tokenizer = read_tokenizer(id_or_path, directory, config)
        check_generation_settings(id_or_path, directory)
        ends = read_eos_token_ids(directory, config, tokenizer)
        name = locate.public_name(id_or_path, directory)
        identity = identity_of(name, revision, config, starts)
    local_heads = None
    if ranks:
        local_heads = ranks.share(shape.num_kv_heads)
        shape = shape.divided(ranks.size)
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
    # transformers fills missing weights with random numbers and only warns.
    for kind in ("missing", "unexpected", "mismatched"):
        if loaded[f"{kind}_keys"]:
            raise NotFound(
                f"model {id_or_path!r}: weights are {kind}: "
                f"{', '.join(sorted(map(str, loaded[f'{kind}_keys'])))}"
            )
    module = module.to(target).eval().requires_grad_(False)
    # transformers replaces the weights of these layers by parts of them, and sums over ranks.
    if not ranks:
        linear.accelerate(module)
    model = LoadedModel(
        identity=identity,
        shape=shape,
        module=module,
        tokenizer=tokenizer,
        device=target,
        dtype=chosen,
        eos_token_ids=ends,
        local_heads=local_heads,
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


def _divided(name: str, config: Any) -> dict[str, DistributedConfig]:
    """Return the arguments with which transformers divides the model among the ranks.

    Raises Unsupported for a family without a suitable plan, and without accelerate.
    """
    families.refuse_undivided(name, config)
    if find_spec("accelerate") is None:
        raise Unsupported(
            "several processes need accelerate to share a model; install a2sf-serve[parallel]"
        )
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def _try_out(model: LoadedModel) -> None:
    """Run one token, so that a layer with unsupported attention is refused at load time."""
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
        raise InvalidArgument("device", f"{name!r}; accepted: auto, cpu, cuda, cuda:0 and so on")
    device = torch.device(name)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        numbered = "".join(f", cuda:{number}" for number in range(found))
        raise InvalidArgument(
            "device",
            f"{name!r}, but the number of CUDA devices that torch finds is {found}; accepted here: "
            f"auto, cpu{', cuda' * bool(found)}{numbered}",
        )
    return device

"""A decoder that runs only some of its layers, for callers that have the first one's input.

Owns the placeholders for skipped layers. The original decoder does not change; the partial decoder
shares its layers and weights. Knows nothing of a particular family.
"""

import copy
from typing import Any

import torch
from torch import Tensor


class _Placeholder(torch.nn.Module):
    """Replaces a layer: returns its input, or a given tensor."""

    def __init__(self, layer: torch.nn.Module, result: Tensor | None = None) -> None:
        super().__init__()
        # A registered child would add the layer's weights to this module.
        object.__setattr__(self, "_layer", layer)
        self._result = result
        self.input: Tensor | None = None
        """[rows, width, hidden], the input of the last call."""

    def __getattr__(self, name: str) -> Any:
        # Decoders read settings of their layers, such as the kind of attention.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self.input = hidden
        return hidden if self._result is None else self._result


def from_layer(decoder: Any, first: int, layer_input: Tensor) -> Any:
    """Return a decoder that starts at layer `first` (1 or more) with the input `layer_input`.

    `layer_input` is [rows, width, hidden]. Of the token ids, only the shape matters.
    """
    layers = list(decoder.layers)
    below = [_Placeholder(layer) for layer in layers[: first - 1]]
    return _with(decoder, [*below, _Placeholder(layers[first - 1], layer_input), *layers[first:]])


def up_to_layer(decoder: Any, last: int) -> tuple[Any, _Placeholder]:
    """Return a decoder that runs the layers below `last`, and the module that stores the result."""
    layers = list(decoder.layers)
    above = [_Placeholder(layer) for layer in layers[last:]]
    return _with(decoder, [*layers[:last], *above]), above[0]


def _with(decoder: Any, layers: list[torch.nn.Module]) -> Any:
    partial = copy.copy(decoder)
    partial._modules = dict(decoder._modules)
    partial.layers = torch.nn.ModuleList(layers)
    return partial

"""A Llama that keeps every key and masks the tokens that the written definition has evicted.

Owns an independent simulation of greedy decoding under a policy: its own forward pass from the
checkpoint's tensors, full-length keys and scores, and a mask of the retained tokens by layer and
head. It shares no code with `a2sf`.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class MaskedLlama:
    """Greedy decoding of one sequence; nothing is freed, evicted tokens are masked."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.weights = {
            name: tensor.to(dtype)
            for name, tensor in load_file(directory / "model.safetensors").items()
        }
        self.heads = self.config["num_attention_heads"]
        self.kv_heads = self.config["num_key_value_heads"]
        self.dim = self.config["head_dim"]
        self.layers = self.config["num_hidden_layers"]
        rope = self.config.get("rope_parameters") or self.config
        theta = rope["rope_theta"]
        self.inverse = theta ** (-torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return hidden * torch.rsqrt(variance + self.config["rms_norm_eps"]) * self.weights[name]

    def _rotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        angle = positions[:, None].float() * self.inverse
        angle = torch.cat([angle, angle], dim=-1).to(vectors.dtype)
        first, second = vectors.chunk(2, dim=-1)
        return vectors * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()

    def decode(
        self,
        prompt: list[int],
        steps: int,
        *,
        alpha: list[list[float]],
        budgets: list[list[int]],
        recents: list[list[int]],
        sinks: int,
        chunk: int,
    ) -> list[tuple[int, float]]:
        """Return each greedy token with its gap to the runner-up, relative to the top logit.

        `alpha`, `budgets` and `recents` have one number per layer and KV head; budgets and recents
        are in tokens.
        """
        total = len(prompt) + steps
        shape = (self.layers, self.kv_heads, total)
        self.keys = torch.zeros(*shape, self.dim, dtype=torch.float32)
        self.values = torch.zeros(*shape, self.dim, dtype=torch.float32)
        self.score = torch.zeros(shape)
        self.alive = torch.zeros(shape, dtype=torch.bool)
        law = {"alpha": alpha, "budgets": budgets, "recents": recents, "sinks": sinks}
        chunk = chunk or len(prompt)
        for start in range(0, len(prompt), chunk):
            logits = self._block(prompt[start : start + chunk], start, **law)
        for layer in range(self.layers):
            for head in range(self.kv_heads):
                keep, recent = budgets[layer][head], recents[layer][head]
                self._evict(layer, head, len(prompt), keep, recent, sinks)
        answer = []
        for step in range(steps):
            top = logits.topk(2).values
            token = int(logits.argmax())
            answer.append((token, float((top[0] - top[1]) / top[0].abs())))
            logits = self._block([token], len(prompt) + step, **law)
        return answer

    def _evict(self, layer: int, head: int, start: int, keep: int, recent: int, sinks: int) -> None:
        while int(self.alive[layer, head].sum()) > keep:
            candidates = [
                (float(self.score[layer, head, p]), p)
                for p in range(sinks, max(start - recent, sinks))
                if self.alive[layer, head, p]
            ]
            self.alive[layer, head, min(candidates)[1]] = False

    def _block(
        self,
        tokens: list[int],
        start: int,
        *,
        alpha: list[list[float]],
        budgets: list[list[int]],
        recents: list[list[int]],
        sinks: int,
    ) -> Tensor:
        count, end = len(tokens), start + len(tokens)
        positions = torch.arange(start, end)
        hidden = self.weights["model.embed_tokens.weight"][torch.tensor(tokens)]
        group = self.heads // self.kv_heads
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            x = self._norm(hidden, name + "input_layernorm.weight")
            q, k, v = (
                (x @ self.weights[f"{name}self_attn.{part}_proj.weight"].T)
                .view(count, -1, self.dim)
                .transpose(0, 1)
                for part in "qkv"
            )
            q, k = self._rotate(q, positions), self._rotate(k, positions)
            attended = torch.zeros(count, self.heads, self.dim)
            for head in range(self.kv_heads):
                keep, recent = budgets[layer][head] - 1, recents[layer][head]
                self._evict(layer, head, start, keep, recent, sinks)
                self.keys[layer, head, start:end] = k[head]
                self.values[layer, head, start:end] = v[head]
                self.alive[layer, head, start:end] = True
                gained = torch.zeros(self.score.shape[-1])
                a = alpha[layer][head]
                for j in range(count):
                    dead = ~self.alive[layer, head].clone()
                    dead[start + j + 1 :] = True
                    weight = 1.0 if j == count - 1 else a ** (count - 1 - j)
                    for h in range(head * group, (head + 1) * group):
                        logits = self.keys[layer, head] @ q[h, j] / math.sqrt(self.dim)
                        row = logits.masked_fill(dead, -math.inf).softmax(-1)
                        attended[j, h] = row @ self.values[layer, head]
                        if weight >= 1e-6:
                            gained += weight * row
                self.score[layer, head] = a**count * self.score[layer, head] + gained
            hidden = hidden + attended.reshape(count, -1) @ (
                self.weights[name + "self_attn.o_proj.weight"].T
            )
            x = self._norm(hidden, name + "post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(x @ self.weights[name + "mlp.gate_proj.weight"].T)
            up = x @ self.weights[name + "mlp.up_proj.weight"].T
            hidden = hidden + (gate * up) @ self.weights[name + "mlp.down_proj.weight"].T
        last = self._norm(hidden[-1], "model.norm.weight")
        head_weight = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return head_weight @ last

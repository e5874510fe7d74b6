"""Implements the model `a2sf` of lm-evaluation-harness: the harness's three kinds of requests.

Owns the translation between the harness's requests and `a2sf.offline.teacher_forcing` (likelihoods)
and `a2sf.engine.engine` (generation). Knows nothing of tasks or metrics; the harness does.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Self

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from pydantic import ValidationError
from tqdm import tqdm

from a2sf.errors import InvalidArgument, NonFinite, Unsupported
from a2sf.model.loader import load_model
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.requests import GenerationRequest
from a2sf.text import chat_template
from a2sf.validation import first_problem
from tuner.harness.arguments import Arguments, SequencePolicies, sampling
from tuner.harness.failures import raise_first
from tuner.harness.generations import complete
from tuner.harness.likelihoods import answer, example_of, passes

MAX_NEW_TOKENS = 256
"""Default for tasks that do not set a number."""


_logger = logging.getLogger(__name__)


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model of the harness whose KV cache evicts by a policy.

    Log-likelihoods are teacher-forced: the context is prefilled as a prompt, and the continuation
    is decoded token by token. With an exact prefill nothing is evicted before the continuation's
    second token, so a policy affects answers of one token only with a `prefill_chunk` above 0.
    Rolling log-likelihoods decode the whole text after its first, prefixed token, in windows of
    `max_length`. Generation uses the serving engine.

    Model arguments are those of `harness_arguments.Arguments`, which `a2sf-lm-eval --help` lists.

    A failed request does not stop the others: they are answered first, and their answers go to the
    harness's cache if there is one. Then the first failure is raised, because the harness cannot
    omit an answer. If the model returns NaN or infinity, the failure is NonFinite.

    Raises InvalidArgument for an argument that is unknown or not accepted, and everything that
    `load_model` and `policies.parse` raise.
    """

    def __init__(self, **arguments: object) -> None:
        super().__init__()
        given = Arguments.read(arguments)
        self.batch_size = min(given.batch_size, given.max_batch_size or given.batch_size)
        self.seed = given.seed
        self.model = load_model(
            given.pretrained, revision=given.revision, device=given.device, dtype=given.dtype
        )
        teacher_forcing.prepare(self.model)
        self.tokenizer = self.model.tokenizer
        self._device = self.model.device
        context = self.model.shape.max_context
        self._max_length = given.max_length or context
        if self._max_length > context:
            raise InvalidArgument("max_length", f"{self._max_length}; accepted: up to {context}")
        self.policies = SequencePolicies(given, self.model)
        self._warned = False

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """Make the model from its arguments and the harness's flags; arguments take precedence."""
        flags = {k: v for k, v in (additional_config or {}).items() if v is not None}
        # The harness's default is cuda:0, also on machines without CUDA.
        if flags.get("device") == "cuda:0":
            flags["device"] = "auto"
        return cls(**{**flags, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Self:
        """Make the model from arguments written `name=value,name=value`, and flags."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        ident: int | None = self.tokenizer.eos_token_id
        return ident

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the BOS token, else the EOS token."""
        ident = self.tokenizer.bos_token_id
        if ident is None:
            ident = self.eot_token_id
        if ident is None:
            raise Unsupported(
                f"model {self.model.identity.id!r} has no token to begin an empty context with"
            )
        return int(ident)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Default number of new tokens, for tasks that do not set one."""
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness's cache of tokenised requests."""
        identity = self.model.identity
        return f"{identity.id}__{identity.fingerprint[:12]}".replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness stores with its results: the model and the policy."""
        table = self.policies.table
        return {
            "a2sf": {
                "model": self.model.identity.model_dump(),
                "policy": self.policies.requested_policy.model_dump(exclude_none=True),
                "table_sha256": table.sha256 if table else None,
                "device": str(self.model.device),
                "dtype": self.model.dtype_name,
                "dtype_reason": self.model.dtype_reason,
            }
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Encode text; None adds the BOS token unless the text begins with it."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the model's chat template."""
        if not chat_template.has_template(self.tokenizer):
            raise Unsupported(
                f"model {self.model.identity.id!r} has no chat template to use; leave out "
                "--apply_chat_template"
            )
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Sum the log-probabilities of each whole text, in nats; each token is predicted once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            overlapping = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in overlapping:
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        sums = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (value, _) in zip(owners, found, strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Complete each prompt with the engine; stop strings are removed from the text."""
        made = [self._generation(str(i), *request.args) for i, request in enumerate(requests)]
        if not made:
            return []
        resolved = [self.policies.at(len(one.prompt_ids) + one.max_new_tokens) for one in made]
        with tqdm(total=len(made), desc="generations", disable=disable_tqdm) as bar:
            texts, failures = complete(
                self.model, made, resolved, rows=self.batch_size, on_end=bar.update
            )
        for index, (request, text) in enumerate(zip(requests, texts, strict=True)):
            if index not in failures:
                self.cache_hook.add_partial("generate_until", request.args, text)
        raise_first(failures, len(made))
        return texts

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, in nats, and whether it is the greedy one."""
        # Choices that differ only in their last token share one prediction.
        asked: defaultdict[Example, list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            asked[self._example(context, continuation)].append(index)
        # All policies are resolved before the first pass, so that errors appear at once.
        resolved = {example: self.policies.at(len(example.token_ids) + 1) for example in asked}
        answers: dict[int, tuple[float, bool]] = {}
        failures: dict[int, BaseException] = {}
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for part in passes(asked, self.batch_size, self.model.shape.vocab_size):
                rules = None if self.policies.full else [resolved[example] for example in part]
                found = teacher_forcing.predict(self.model, part, rules, batch=len(part))
                for example, prediction in zip(part, found, strict=True):
                    log_p = prediction.logits.log_softmax(dim=-1)
                    for index in asked[example]:
                        pair, _, continuation = requests[index]
                        answers[index] = answer(log_p, continuation)
                        if not math.isfinite(answers[index][0]):
                            failures[index] = NonFinite(
                                "the model gave NaN or infinity; where activations overflow in "
                                "float16, give dtype=bfloat16 or dtype=float32"
                            )
                        elif pair is not None:
                            self.cache_hook.add_partial("loglikelihood", pair, answers[index])
                    bar.update(len(asked[example]))
        raise_first(failures, len(requests))
        return [answers[index] for index in range(len(requests))]

    def _example(self, context: Sequence[int], continuation: Sequence[int]) -> Example:
        """Return the sequence to run for a pair: all tokens except the last.

        The last token predicts nothing.
        """
        if not 1 <= len(continuation) <= self.max_length:
            raise InvalidArgument(
                "continuation",
                f"{len(continuation)} tokens; accepted: 1 to max_length, {self.max_length}",
            )
        # The last token is only predicted, so there is room for one more.
        before = context or [self.prefix_token_id]
        whole = self._fit((*before, *continuation), self.max_length + 1)
        return example_of(whole, len(continuation))

    def _generation(
        self, name: str, context: str, gen_kwargs: Mapping[str, Any]
    ) -> GenerationRequest:
        """Translate one request of the harness to a request of the engine."""
        wanted = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        until, new = wanted.pop("until"), wanted.pop("max_gen_toks")
        room = self.max_length - new
        if room < 1:
            raise InvalidArgument(
                "max_gen_toks", f"{new}; accepted: below max_length, {self.max_length}"
            )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        try:
            return GenerationRequest(
                request_id=name,
                prompt_ids=self._fit(prompt, room),
                max_new_tokens=new,
                sampling=sampling(wanted, self.seed + int(name)),
                stop=tuple(stop for stop in until if stop),
                cache_policy=self.policies.requested_policy,
                table=self.policies.table,
            )
        except ValidationError as error:
            raise InvalidArgument("gen_kwargs", first_problem(error)) from None

    def _fit(self, ids: Sequence[int], room: int) -> tuple[int, ...]:
        """Return the last `room` tokens; warns once if any sequence is cut."""
        if len(ids) > room and not self._warned:
            self._warned = True
            _logger.warning(
                "a sequence of %d tokens loses its beginning, as do all sequences longer than "
                "max_length %d",
                len(ids),
                self.max_length,
            )
        return tuple(ids[-room:])

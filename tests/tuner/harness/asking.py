"""Asks the harness's model, and transformers' own, for likelihoods and texts."""

from typing import Any

import torch
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer

from a2sf import reference
from tuner.harness.model import HarnessModel

TABLE = reference.path() / "tables" / "mathqa.json"


PAIRS = [
    ("The code of the lamp is 412.\nWhat is the code of the lamp?", " 412"),
    ("The code of the lamp is 412.\nWhat is the code of the lamp?", " 413"),
    ("The cat sat on the mat and looked at", " the dog, which barked. "),
    ("A space stands at the end ", "of this context"),
    ("", "Nothing comes before this sentence."),
]


PROMPTS = [
    "The code of the lamp is 412. The code of the door is 7.\nWhat is the code of the door?",
    "Question: what is",
    "",
]


def harness_model(**arguments: object) -> HarnessModel:
    return HarnessModel(**{"pretrained": "reference", "device": "cpu", **arguments})


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=index)  # type: ignore[arg-type]
        for index, given in enumerate(arguments)
    ]


def likelihoods(
    model: HarnessModel, pairs: list[tuple[str, str]] = PAIRS
) -> list[tuple[float, bool]]:
    found = model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert isinstance(found, list)
    return found


def generate(model: HarnessModel, prompts: list[str] = PROMPTS, **gen_kwargs: Any) -> list[str]:
    asked: list[tuple[Any, ...]] = [(prompt, gen_kwargs) for prompt in prompts]
    return model.generate_until(instances("generate_until", asked), disable_tqdm=True)


def rolling(model: HarnessModel, *texts: str) -> list[float]:
    asked: list[tuple[Any, ...]] = [(text,) for text in texts]
    return model.loglikelihood_rolling(instances("loglikelihood_rolling", asked), disable_tqdm=True)


def token_pairs(model: HarnessModel) -> list[tuple[list[int], list[int]]]:
    """The pairs as the harness cuts them: a space at the end goes to the continuation."""
    return [
        model._encode_pair(context, continuation)
        if context
        else ([model.prefix_token_id], model.tok_encode(continuation, add_special_tokens=False))
        for context, continuation in PAIRS
    ]


def plain_log_p(plain: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return plain(torch.tensor([ids])).logits[0].log_softmax(dim=-1)


def plain_text(plain: Any, ids: list[int], new: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(reference.path())
    prompt = torch.tensor([ids])
    whole = plain.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text

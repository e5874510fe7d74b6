"""Ctrl-C ends the client and its call quietly, with exit code 130, at any time."""

import asyncio
import os
import pty
import signal
import sys
import threading

import psutil
import pytest

from service.client.terminal.interrupt import Interrupt
from service.status import Cancelled
from tests.service.conftest import WAIT_S, StartServer, until


async def test_an_interrupt_ends_the_call_and_exits_130(start_server: StartServer) -> None:
    server, _, address = await start_server()
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service.client", "x", "--target", address, "--ignore-eos"),
        *("--max-new-tokens", "900000"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert client.stdout is not None
    async with asyncio.timeout(WAIT_S):
        await client.stdout.read(1)
        client.send_signal(signal.SIGINT)
        _, err = await client.communicate()
    assert (client.returncode, err) == (130, b"")
    await until(lambda: not server.num_calls)


async def test_an_interrupt_during_loading_ends_the_client_quietly() -> None:
    # The rest of the command line loads for as long as the test likes.
    stuck = """
import sys, time
from service.client.__main__ import main
class Slow:
    def find_spec(self, name, *_):
        if name == "service.client.terminal.cli":
            print("loading", flush=True)
            while True:
                time.sleep(1)
sys.meta_path.insert(0, Slow())
main()
"""
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", stuck),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert client.stdout is not None
    async with asyncio.timeout(WAIT_S):
        assert await client.stdout.readline() == b"loading\n"
        client.send_signal(signal.SIGINT)
        _, err = await client.communicate()
    assert (client.returncode, err) == (130, b"")


async def test_an_interrupt_ends_a_conversation_that_waits_for_a_line() -> None:
    ours, theirs = pty.openpty()
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service.client", "--chat", "--target", "127.0.0.1:1"),
        stdin=theirs,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(theirs)
    assert client.stderr is not None
    async with asyncio.timeout(WAIT_S):
        assert b"/quit" in await client.stderr.readline()
        # Between its last look at signals and its wait for the line, Python hears none.
        await until(lambda: psutil.Process(client.pid).status() == psutil.STATUS_SLEEPING)
        client.send_signal(signal.SIGINT)
        assert await client.stderr.read() == b""
        assert await client.wait() == 130
    os.close(ours)


def test_an_interrupt_is_raised_after_a_call_and_not_in_it() -> None:
    interrupt, ended = Interrupt(), threading.Event()
    reached: list[bool] = []

    def call() -> None:
        with interrupt.raised(), interrupt.ending(ended.set):
            interrupt()
            reached.append(ended.wait(WAIT_S))
            raise Cancelled("as a call of a closed channel ends")

    with pytest.raises(KeyboardInterrupt):
        call()
    assert reached == [True]


async def test_a_second_interrupt_ends_the_process() -> None:
    stuck = """
import signal, time
from service.client.terminal.interrupt import Interrupt
interrupt = Interrupt()
signal.signal(signal.SIGINT, interrupt)
with interrupt.ending(lambda: print("ended", flush=True)):
    print("ready", flush=True)
    while True:
        time.sleep(1)
"""
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", stuck), stdout=asyncio.subprocess.PIPE
    )
    assert program.stdout is not None
    async with asyncio.timeout(WAIT_S):
        for said in (b"ready\n", b"ended\n"):
            assert await program.stdout.readline() == said
            program.send_signal(signal.SIGINT)
        assert await program.wait() == 130

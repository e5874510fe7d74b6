"""The client's command line: a prompt in, tokens as they arrive, one line of figures.

Owns the flags, what is printed and the exit code: 0, 1 for a call that failed (one line on stderr),
130 when interrupted. Knows nothing of gRPC; the client does.
"""

import asyncio
import os
import sys
from contextlib import aclosing
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.filesize import decimal

from a2sf.errors import A2SFError
from a2sf.policy import CachePolicy, Preset
from a2sf.requests import Delta, Finished, Sampling
from a2sf.schema import first_problem
from service.client import DEFAULT_TIMEOUT_S, Client
from service.client_conversions import GenerationOptions

INTERRUPTED = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def complete(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    target: Annotated[str, typer.Option(help="The server, HOST:PORT.")] = "127.0.0.1:50051",
    table: Annotated[str | None, typer.Option(help="Forget by this alpha table.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Forget by this one factor, 0 to 1.")] = None,
    preset: Annotated[Preset | None, typer.Option(help="Forget by a known method.")] = None,
    budget: Annotated[
        int | None, typer.Option(help="Tokens each head keeps, the mean over layers.")
    ] = None,
    budget_ratio: Annotated[
        float | None, typer.Option(help="The same, as a share of prompt + new tokens.")
    ] = None,
    recent: Annotated[
        int | None, typer.Option(help="Newest tokens that are never forgotten.")
    ] = None,
    recent_share: Annotated[
        float | None, typer.Option(help="The same, as a share of budget - sinks - 1.")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens that are never forgotten.")
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Tokens of one prompt block; 0 for one block.")
    ] = None,
    random_seed: Annotated[int | None, typer.Option(help="Seed of preset random.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. [default: 1]")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from this probability mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out the less likely.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the completion; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Write past the end of the sequence.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds until the call is given up.")
    ] = DEFAULT_TIMEOUT_S,
) -> None:
    """Complete PROMPT on a running server; print tokens as they arrive, then the figures."""
    policy = {
        "table": table,
        "alpha": alpha,
        "preset": preset,
        "budget": budget,
        "budget_ratio": budget_ratio,
        "recent": recent,
        "recent_share": recent_share,
        "sinks": sinks,
        "prefill_chunk": prefill_chunk,
        "random_seed": random_seed,
    }
    drawn = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    try:
        options = GenerationOptions(
            cache_policy=CachePolicy.model_validate(policy),
            sampling=Sampling.model_validate({k: v for k, v in drawn.items() if v is not None}),
            stop=stop or (),
            ignore_eos=ignore_eos,
        )
        asyncio.run(_print_completion(target, prompt, max_new_tokens, timeout, options))
    except ValidationError as error:
        _fail(first_problem(error))
    except A2SFError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read the output has left, as `head` does; the interpreter would complain of it
        # once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


async def _print_completion(
    target: str, prompt: str, max_new_tokens: int, timeout_s: float, options: GenerationOptions
) -> None:
    async with (
        Client(target) as client,
        aclosing(
            client.stream_generate(
                prompt, max_new_tokens=max_new_tokens, timeout_s=timeout_s, **options
            )
        ) as events,
    ):
        async for event in events:
            if isinstance(event, Delta):
                print(event.text, end="", flush=True)
            elif isinstance(event, Finished):
                print(f"\n{figures(event)}")


def figures(event: Finished) -> str:
    """Put what a completion took into one line for people."""
    usage, cache, timings = event.usage, event.cache, event.timings
    tokens = usage.completion_tokens
    # The first token came out of the prefill; the others took the decode's time.
    rate = f"{(tokens - 1) / timings.decode_s:.1f} tokens/s" if timings.decode_s > 0 else "at once"
    return (
        f"{tokens} tokens ({event.reason.value}), {rate}; each head kept {cache.kept_tokens} of "
        f"{cache.kept_tokens + cache.evicted_tokens} tokens, evicted {cache.evicted_tokens}; "
        f"KV {decimal(cache.kv_bytes)} against {decimal(cache.kv_bytes_full)} in a full cache"
    )


def _fail(message: str) -> None:
    # Whatever of the completion was printed ends here.
    sys.stdout.flush()
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(1)

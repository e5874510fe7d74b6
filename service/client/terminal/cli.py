"""The client's command line: completes a prompt or holds a conversation, then prints figures.

Owns the flags and the exit codes: 0; 1 for a failed call (one line on stderr); 2 for arguments that
are refused before any call; 130 when interrupted. Knows nothing of how calls are made or shown.
"""

import os
import sys
from typing import Annotated, Any, TypeVar

import typer

from a2sf.errors import A2SFError
from a2sf.policy import CachePolicy, Preset
from a2sf.requests import Sampling
from a2sf.validation import Given
from service.client.calls import DEFAULT_TIMEOUT_S
from service.client.requests import GenerationOptions
from service.client.sync import SyncClient
from service.client.terminal.connection import (
    InsecureToken,
    ServerName,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    UseTls,
    channel_options,
    exit_code,
    server_option,
)
from service.client.terminal.display import JsonLinesDisplay, TextDisplay, report_json, report_line
from service.client.terminal.interrupt import INTERRUPTED, Interrupt
from service.client.terminal.session import Session
from service.status import Violations, field_prefix

Checked = TypeVar("Checked", bound=Given)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _panel(title: str) -> Any:
    def option(*names: str, **settings: Any) -> Any:
        return typer.Option(*names, rich_help_panel=title, **settings)

    return option


_length = _panel("Length")
_sampling = _panel("Sampling")
_policy = _panel("Cache policy")
_output = _panel("Output")
_chat = _panel("Conversation")


@app.command(no_args_is_help=True)
def complete(
    context: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="Text to continue, or a message with --chat; - reads it from stdin.",
        ),
    ] = None,
    target: Annotated[
        str,
        server_option(
            help="The server, HOST:PORT; or several: dns:///NAME:PORT for a name with several "
            "addresses, or a list, IP:PORT,IP:PORT."
        ),
    ] = "127.0.0.1:50051",
    timeout: Annotated[
        float, server_option(help="Deadline of the call, in seconds.")
    ] = DEFAULT_TIMEOUT_S,
    token_file: TokenFile = None,
    insecure_token: InsecureToken = False,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    server_name: ServerName = None,
    request_id: Annotated[str, server_option(help="Id of the request in the server's log.")] = "",
    chat: Annotated[
        bool,
        _chat(
            "--chat",
            help="PROMPT is a chat message. Without PROMPT: a conversation, one line of stdin per "
            "turn; /reset clears it, /quit or the end of input exits.",
        ),
    ] = False,
    system: Annotated[
        str | None, _chat(help="System message before the conversation; needs --chat.")
    ] = None,
    max_new_tokens: Annotated[int, _length(help="The most tokens to generate.")] = 128,
    min_new_tokens: Annotated[
        int, _length(help="Until this many tokens, only the time limit ends the completion.")
    ] = 0,
    time_limit: Annotated[
        float | None,
        _length(help="Seconds after which the completion ends with the tokens so far."),
    ] = None,
    stop: Annotated[
        list[str] | None, _length(help="A string that ends the completion; repeatable.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, _length(help="A token id that ends the completion; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, _length("--ignore-eos", help="Continue past the end-of-sequence token.")
    ] = False,
    repetition_penalty: Annotated[
        float | None, _sampling(help="A value above 1 discourages repetition. [default: 1]")
    ] = None,
    temperature: Annotated[float | None, _sampling(help="0 is greedy. [default: 1]")] = None,
    top_k: Annotated[int | None, _sampling(help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None,
        _sampling(help="Sample from the most likely tokens with this total probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        _sampling(help="Leave out tokens below this share of the highest probability."),
    ] = None,
    seed: Annotated[int | None, _sampling(help="Seed that makes sampling repeatable.")] = None,
    table: Annotated[str | None, _policy(help="Evict by this alpha table.")] = None,
    alpha: Annotated[
        float | None, _policy(help="Evict by this alpha in all heads, 0 to 1.")
    ] = None,
    preset: Annotated[Preset | None, _policy(help="Evict by this preset.")] = None,
    budget: Annotated[
        int | None, _policy(help="Tokens that each head keeps, averaged over heads.")
    ] = None,
    budget_ratio: Annotated[
        float | None, _policy(help="The budget as a share of prompt + new tokens.")
    ] = None,
    min_budget: Annotated[
        int | None,
        _policy(help="Lower bound of a ratio, in tokens; 0: none."),
    ] = None,
    recent: Annotated[int | None, _policy(help="Newest tokens that are never evicted.")] = None,
    recent_share: Annotated[
        float | None, _policy(help="The recent tokens as a share of budget - sinks - 1.")
    ] = None,
    sinks: Annotated[int | None, _policy(help="First tokens that are never evicted.")] = None,
    prefill_chunk: Annotated[
        int | None, _policy(help="Tokens per prompt block; 0: the whole prompt in one block.")
    ] = None,
    random_seed: Annotated[int | None, _policy(help="Seed of preset random.")] = None,
    echo: Annotated[
        bool, _output("--echo", help="Show the prompt first, as the model reads it.")
    ] = False,
    logprobs: Annotated[
        bool, _output("--logprobs", help="Show the log-probability of each token.")
    ] = False,
    top_logprobs: Annotated[
        int, _output(help="Most likely tokens to show per step; needs --logprobs.")
    ] = 0,
    as_json: Annotated[
        bool, _output("--json", help="Print each event, and an error, as one line of JSON.")
    ] = False,
) -> None:
    """Complete PROMPT on a running server; print tokens as they arrive, then the figures.

    `a2sf-client admin` has the commands of the admin port; - reads the prompt "admin" from stdin.

    Exit codes: 0; 1 for a failed call; 2 for wrong usage, or a value that is refused before any
    call; 130 when interrupted.
    """
    if prompt is None and not chat:
        raise typer.BadParameter("give PROMPT, or --chat for a conversation")
    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat")
    report = report_json if as_json else report_line
    # If another program calls this, Ctrl-C is left to that program.
    interrupt = context.obj or Interrupt()
    policy_flags = {
        "table": table,
        "alpha": alpha,
        "preset": preset,
        "budget": budget,
        "budget_ratio": budget_ratio,
        "min_budget": min_budget,
        "recent": recent,
        "recent_share": recent_share,
        "sinks": sinks,
        "prefill_chunk": prefill_chunk,
        "random_seed": random_seed,
    }
    sampling_flags = {
        "repetition_penalty": repetition_penalty,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    try:
        with interrupt.raised():
            violations, sampling, cache_policy = Violations(), Sampling(), CachePolicy()
            with violations.collect():
                sampling = _checked(Sampling, "input.sampling", sampling_flags)
            with violations.collect():
                cache_policy = _checked(CachePolicy, "input.cache_policy", policy_flags)
            violations.check()
            options = GenerationOptions(
                min_new_tokens=min_new_tokens,
                sampling=sampling,
                stop=stop or (),
                stop_token_ids=stop_token_id or (),
                ignore_eos=ignore_eos,
                cache_policy=cache_policy,
                request_id=request_id,
                # For the live figures; JSON output shows them too.
                token_ids=True,
                logprobs=logprobs,
                top_logprobs=top_logprobs,
                echo=echo,
            )
            if time_limit is not None:
                options["time_limit_s"] = time_limit
            channel = channel_options(
                token_file=token_file,
                insecure_token=insecure_token,
                tls=tls,
                tls_ca=tls_ca,
                tls_cert=tls_cert,
                tls_key=tls_key,
                server_name=server_name,
            )
            given = sys.stdin.read() if prompt == "-" else prompt
            with SyncClient(target, channel) as client:
                display = JsonLinesDisplay if as_json else TextDisplay
                session = Session(
                    client, max_new_tokens, timeout, options, display, interrupt, report
                )
                if given is None:
                    session.converse(system)
                elif chat:
                    session.answer(given, system)
                else:
                    session.complete(given)
    except A2SFError as error:
        report(error)
        raise typer.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of stdout has gone, as with `head`. Without this, the interpreter would report
        # the error again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


def _checked(cls: type[Checked], name: str, values: dict[str, Any]) -> Checked:
    """Build a value from the flags that were given. Raises InvalidArgument with their names."""
    with field_prefix(name):
        return cls(**{k: v for k, v in values.items() if v is not None})

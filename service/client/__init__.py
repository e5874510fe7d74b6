"""The client: one method per RPC, typed results, and errors of the project's own classes.

Owns the public names of the client: `service.client.aio` has the methods for asyncio, and
`service.client.sync` those for threads; the values and errors of a call have names here too. Knows
nothing of the server's internals. As a program (`python -m service.client "prompt"`) it runs
`service.client.terminal.cli`, which must handle Ctrl-C before any slow import; so each name imports
its module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a2sf.errors import (
        A2SFError,
        Aborted,
        Conflict,
        InvalidArgument,
        InvalidRequest,
        NotFound,
        ResourceExhausted,
        TableError,
        Unauthenticated,
        Unavailable,
        Unsupported,
    )
    from a2sf.policy import CachePolicy
    from a2sf.requests import ChatMessage, Finished, Sampling
    from service.client.aio import AdminClient, Client
    from service.client.calls import DEFAULT_TIMEOUT_S, DESCRIBE_TIMEOUT_S
    from service.client.channel import ChannelOptions, Tls
    from service.client.requests import Chat, GenerationOptions
    from service.client.results import Delta, StreamStarted
    from service.client.sync import SyncAdminClient, SyncClient
    from service.status import Cancelled, DeadlineExceeded, NoRoom, RemoteError

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "DESCRIBE_TIMEOUT_S",
    "A2SFError",
    "Aborted",
    "AdminClient",
    "CachePolicy",
    "Cancelled",
    "ChannelOptions",
    "Chat",
    "ChatMessage",
    "Client",
    "Conflict",
    "DeadlineExceeded",
    "Delta",
    "Finished",
    "GenerationOptions",
    "InvalidArgument",
    "InvalidRequest",
    "NoRoom",
    "NotFound",
    "RemoteError",
    "ResourceExhausted",
    "Sampling",
    "StreamStarted",
    "SyncAdminClient",
    "SyncClient",
    "TableError",
    "Tls",
    "Unauthenticated",
    "Unavailable",
    "Unsupported",
]

if not TYPE_CHECKING:
    _MODULES = {
        "a2sf.errors": (
            "A2SFError",
            "Aborted",
            "Conflict",
            "InvalidArgument",
            "InvalidRequest",
            "NotFound",
            "ResourceExhausted",
            "TableError",
            "Unauthenticated",
            "Unavailable",
            "Unsupported",
        ),
        "a2sf.policy": ("CachePolicy",),
        "a2sf.requests": ("ChatMessage", "Finished", "Sampling"),
        "service.client.aio": ("AdminClient", "Client"),
        "service.client.calls": ("DEFAULT_TIMEOUT_S", "DESCRIBE_TIMEOUT_S"),
        "service.client.channel": ("ChannelOptions", "Tls"),
        "service.client.requests": ("Chat", "GenerationOptions"),
        "service.client.results": ("Delta", "StreamStarted"),
        "service.client.sync": ("SyncAdminClient", "SyncClient"),
        "service.status": ("Cancelled", "DeadlineExceeded", "NoRoom", "RemoteError"),
    }
    _HOMES = {name: module for module, names in _MODULES.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)

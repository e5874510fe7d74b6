"""The client: one method per RPC, typed results, and errors of the project's own classes.

Owns the public names of the client: `service.client.aio` has those for asyncio, and
`service.client.sync` those for threads. Knows nothing of the server's internals. As a program
(`python -m service.client "prompt"`) it runs `service.client.terminal.cli`, which must handle
Ctrl-C before any slow import; so each name imports its module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a2sf.requests import ChatMessage
    from service.client.aio import AdminClient, Client
    from service.client.calls import DEFAULT_TIMEOUT_S, DESCRIBE_TIMEOUT_S
    from service.client.channel import ChannelOptions, Tls
    from service.client.options import Chat, GenerationOptions
    from service.client.sync import SyncAdminClient, SyncClient

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "DESCRIBE_TIMEOUT_S",
    "AdminClient",
    "ChannelOptions",
    "Chat",
    "ChatMessage",
    "Client",
    "GenerationOptions",
    "SyncAdminClient",
    "SyncClient",
    "Tls",
]

if not TYPE_CHECKING:
    _MODULES = {
        "a2sf.requests": ("ChatMessage",),
        "service.client.aio": ("AdminClient", "Client"),
        "service.client.calls": ("DEFAULT_TIMEOUT_S", "DESCRIBE_TIMEOUT_S"),
        "service.client.channel": ("ChannelOptions", "Tls"),
        "service.client.options": ("Chat", "GenerationOptions"),
        "service.client.sync": ("SyncAdminClient", "SyncClient"),
    }
    _HOMES = {name: module for module, names in _MODULES.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)

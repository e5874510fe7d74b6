"""The client: one method for each RPC, typed results, errors of the project's own tree.

Owns the names that a program needs of a client: those for asyncio are in `service.client.aio`,
those for threads in `service.client.sync`. Knows nothing of the server's insides. Run as a program
(`python -m service.client "prompt"`) it is the command line of `service.client.cli`, which must
hear Ctrl-C before anything heavy is loaded; so a name loads its module when it is first asked for.
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

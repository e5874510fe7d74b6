"""Watches the directory of alpha tables, so that a new table is served without a restart.

Owns when the directory is read again. Knows nothing of its content.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import structlog
from watchfiles import awatch

from a2sf.errors import NotFound
from service.backend.tables import Reloaded, TableCatalog

log = structlog.get_logger(__name__)

QUIET_MS = 100
"""The directory is read after this time without changes, in milliseconds."""

DEBOUNCE_MS = 2000
"""It is read at most this long after the first change, even if changes continue."""

RECHECK_S = 3.0
"""Seconds between checks without a notification: network file systems send none, and neither does
a directory that replaces the watched one."""


async def watch(
    catalog: TableCatalog, directory: Path, reload: Callable[[], Awaitable[Reloaded]]
) -> None:
    """Call `reload` whenever `directory`, the catalog's directory, changes; runs until cancelled.

    If the directory is missing, wait until it is back.
    """
    missing = False
    async with aclosing(_change_signals(directory)) as signals:
        async for changed in signals:
            if not (changed or missing or await asyncio.to_thread(catalog.outdated)):
                continue
            try:
                await reload()
            except NotFound as error:
                if not missing:
                    log.warning("tables not read", directory=str(directory), reason=str(error))
                missing = True
                continue
            if missing:
                log.info("tables directory is back", directory=str(directory))
            missing = False


async def _change_signals(directory: Path) -> AsyncGenerator[bool, None]:
    """Yield True after a notified change, and False when it is time to check for changes."""
    reason = None
    while True:
        try:
            inode = await asyncio.to_thread(_inode, directory)
            async with aclosing(
                awatch(
                    directory,
                    watch_filter=None,
                    debounce=DEBOUNCE_MS,
                    step=QUIET_MS,
                    rust_timeout=int(RECHECK_S * 1000),
                    yield_on_timeout=True,
                    # The targets of Kubernetes' links are not watched; the links change too.
                    recursive=False,
                )
            ) as changes:
                async for changed in changes:
                    reason = None
                    yield bool(changed)
                    if await asyncio.to_thread(_inode, directory) != inode:
                        break
        # RuntimeError: the system's limit on watches is reached.
        except (OSError, RuntimeError) as error:
            if str(error) != reason:
                reason = str(error)
                log.warning(
                    "tables directory cannot be watched; checked at intervals instead",
                    directory=str(directory),
                    every_s=RECHECK_S,
                    reason=reason,
                )
            yield False
            await asyncio.sleep(RECHECK_S)


def _inode(directory: Path) -> tuple[int, int]:
    seen = directory.stat()
    return seen.st_dev, seen.st_ino

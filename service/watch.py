"""Watching the directory of alpha tables, so that a table put there is served without a restart.

Owns when the directory is read again. Knows nothing of what is in it.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import structlog
from watchfiles import awatch

from a2sf.errors import NotFound
from service.tables import Reloaded, TableCatalog

log = structlog.get_logger(__name__)

QUIET_MS = 100
"""The directory is read once nothing has changed in it for this long."""

DEBOUNCE_MS = 2000
"""It is read at the latest so long after the first change, however many follow."""

RECHECK_S = 3.0
"""How often the directory is looked at without having been told of a change: network file systems
tell of none, nor does a directory that was put in the place of the one that is watched."""


async def watch(
    catalog: TableCatalog, directory: Path, reload: Callable[[], Awaitable[Reloaded]]
) -> None:
    """Call `reload` whenever `directory`, which is the catalog's, changes, until cancelled.

    A directory that is gone is waited for.
    """
    lost = False
    async with aclosing(_glances(directory)) as glances:
        async for told in glances:
            if not (told or lost or await asyncio.to_thread(catalog.outdated)):
                continue
            try:
                await reload()
            except NotFound as error:
                if not lost:
                    log.warning("tables not read", directory=str(directory), reason=str(error))
                lost = True
                continue
            if lost:
                log.info("tables directory is back", directory=str(directory))
            lost = False


async def _glances(directory: Path) -> AsyncGenerator[bool, None]:
    """Yield True when told of a change, False when it is time to look whether there was one."""
    reason = None
    while True:
        try:
            place = await asyncio.to_thread(_place, directory)
            async with aclosing(
                awatch(
                    directory,
                    watch_filter=None,
                    debounce=DEBOUNCE_MS,
                    step=QUIET_MS,
                    rust_timeout=int(RECHECK_S * 1000),
                    yield_on_timeout=True,
                    # Where the targets of Kubernetes' links are is no matter: the links change.
                    recursive=False,
                )
            ) as changes:
                async for told in changes:
                    reason = None
                    yield bool(told)
                    if await asyncio.to_thread(_place, directory) != place:
                        break
        # RuntimeError: the system has no watch left to give.
        except (OSError, RuntimeError) as error:
            if str(error) != reason:
                reason = str(error)
                log.warning(
                    "tables directory cannot be watched; looked at from time to time instead",
                    directory=str(directory),
                    every_s=RECHECK_S,
                    reason=reason,
                )
            yield False
            await asyncio.sleep(RECHECK_S)


def _place(directory: Path) -> tuple[int, int]:
    seen = directory.stat()
    return seen.st_dev, seen.st_ino

"""The adapters that are there from the start: those that ship, and those that the settings name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.errors import AdapterStoreError
from adapters_store.shipped import shipped_adapters
from server.config import EMBEDDED_MODEL
from server.errors import CannotServe

if TYPE_CHECKING:
    from adapters_store.store import AdapterStore
    from server.config import Settings

logger = logging.getLogger("manylora")


def adapter_directories(settings: Settings) -> list[tuple[str, Path]]:
    """Name and directory of each NAME=DIR of the settings; CannotServe for what is none."""
    found = []
    for entry in settings.adapter:
        name, _, path = entry.partition("=")
        directory = Path(path).expanduser()
        if not name or not path or not directory.is_dir():
            raise CannotServe(
                f"--adapter {entry!r} is not NAME=DIR with a directory that PEFT has written"
            )
        found.append((name, directory))
    return found


def register_adapters(settings: Settings, store: AdapterStore) -> None:
    """Add the shipped adapters whose names are free, and those that the settings name.

    Raises CannotServe for a NAME=DIR that cannot be registered.
    """
    if settings.shipped_adapters and settings.model == EMBEDDED_MODEL:
        known = {adapter.adapter_id for adapter in store.adapters()}
        for name, directory in shipped_adapters().items():
            if name not in known:
                logger.info("registering the shipped adapter %s", name)
                store.add(name, directory, description="shipped with manylora")
    for name, directory in adapter_directories(settings):
        try:
            store.add(name, directory)
        except AdapterStoreError as error:
            raise CannotServe(f"--adapter {name}={directory}: {error}") from error

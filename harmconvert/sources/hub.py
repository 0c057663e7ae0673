"""Harmonic checkpoints in repositories of the Hugging Face hub, and in folders with the same files."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError

from ..arguments import HARMONIC_FILE
from ..storage.source import parse_source
from .downloads import downloading


def published_checkpoint(text: str) -> Path | None:
    """Return the harmonic checkpoint of an ``hf-hub:`` or ``local-dir:`` source, downloaded if necessary.

    None: the source is of another kind, or has no such file.

    Raises:
        OutsideError: the repository does not exist or cannot be reached.
    """
    source = parse_source(text)
    if source.scheme == "local-dir":
        path = Path(source.name) / HARMONIC_FILE
        return path if path.is_file() else None
    if source.scheme != "hf-hub":
        return None
    repository, _, revision = source.name.partition("@")
    with downloading(str(source)):
        try:
            return Path(huggingface_hub.hf_hub_download(repository, HARMONIC_FILE, revision=revision or None))
        except EntryNotFoundError:  # a repository of timm; without a connection: not in the cache
            return None

"""A folder or a repository on the Hugging Face hub that has the config and the weights of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..errors import InputError, first_line
from ..files import read_json

# Entries of a config that make a library import code or load files. They are not recorded, and refused in a record.
_NOT_FOR_REBUILDING = {
    "auto_map", "attn_implementation", "experts_implementation", "quantization_config", "encoder_weights",
    "trust_remote_code",
}  # fmt: skip


@dataclass(frozen=True)
class Repository:
    """A folder, or a repository on the hub and a folder in it."""

    folder: Path | None
    name: str = ""
    subfolder: str = ""

    @classmethod
    def named(cls, text: str) -> Repository:
        """Return the folder of this path if there is one, else the repository USER/REPO or USER/REPO/SUBFOLDER.

        Raises:
            InputError: the text can only be a path, and there is no such folder.
        """
        folder = Path(text).expanduser()
        if folder.is_dir():
            return cls(folder)
        if folder.is_absolute() or text.startswith((".", "~")) or folder.exists():
            raise InputError(f"no such folder: {text} {'is a file' if folder.exists() else 'does not exist'}")
        user, slash, rest = text.strip("/").partition("/")
        repository, _, subfolder = rest.partition("/")
        return cls(None, f"{user}{slash}{repository}", subfolder)

    def __str__(self) -> str:
        return str(self.folder) if self.folder else "/".join(part for part in (self.name, self.subfolder) if part)

    def file(self, name: str) -> Path | None:
        """Return the path of a file, downloaded if it is on the hub; None if the repository does not have it."""
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        try:
            return Path(huggingface_hub.hf_hub_download(self.name, name, subfolder=self.subfolder or None))
        except LocalEntryNotFoundError:  # there is no internet connection
            raise
        except EntryNotFoundError:
            return None

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the content of a JSON file; None if the repository does not have it.

        Raises:
            InputError: the file is not a JSON object.
        """
        path = self.file(name)
        if path is None:
            return None
        try:
            content = read_json(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is unreadable: {first_line(error)}; get the file again") from error
        if not isinstance(content, dict):
            raise InputError(f"{path} is unreadable: it holds a {type(content).__name__}; get the file again")
        return content

    def weights(self, names: Sequence[str]) -> Path:
        """Return the path of the first file of weights that the repository has; an index comes with all its files.

        Raises:
            InputError: there is none.
        """
        for name in (f"{name}{end}" for end in ("", ".index.json") for name in names):
            if (path := self.file(name)) is not None:
                index = self.json(name) if name.endswith(".index.json") else None
                places = index.get("weight_map") if index else None
                for part in sorted({*map(str, places.values())}) if isinstance(places, dict) else []:
                    self.file(part)
                return path
        raise InputError(f"{self} has no weights: neither {' nor '.join(names)}")


def plain_config(config: Any) -> Any:
    """Return a config without the entries that make a library import code or load files.

    >>> plain_config({"depth": 2, "auto_map": {"AutoModel": "net.Net"}, "backbone": {"_name_or_path": "x", "depth": 3}})
    {'depth': 2, 'backbone': {'depth': 3}}
    """
    if isinstance(config, Mapping):
        return {str(key): plain_config(value) for key, value in config.items() if not _loads(key)}
    return [plain_config(value) for value in config] if isinstance(config, list | tuple) else config


def loads_files(config: Any) -> bool:
    """Return whether a config has an entry that `plain_config` removes.

    >>> loads_files([{"depth": 2}]), loads_files([{"_name_or_path": "x"}])
    (False, True)
    """
    if isinstance(config, Mapping):
        return any(_loads(key) or loads_files(value) for key, value in config.items())
    return isinstance(config, list | tuple) and any(map(loads_files, config))


def _loads(key: Any) -> bool:
    return str(key).startswith("_") or key in _NOT_FOR_REBUILDING

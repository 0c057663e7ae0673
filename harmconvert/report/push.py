"""push(): publish a harmonic checkpoint in a repository of the Hugging Face hub, or write its files to a folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils

from ..arguments import HARMONIC_FILE, TIMM_FILES, check_hub_name, may_be_harmonic
from ..deploy import write_timm_files
from ..errors import Argument, CheckError, InputError, OutsideError, UsageError, first_line
from ..files import check_folder, short_name, write_folder, write_text
from ..network.declared import pretrained_config
from ..network.forms import dense_form
from ..network.values import default_input
from ..pipeline.listener import SILENT, Listener
from ..pipeline.networks import opened
from ..sources import SourceRequest
from ..storage.checkpoint import Network
from ..storage.weights import saving
from .card import model_card
from .facts import Report
from .summary import report_of

FILES = (HARMONIC_FILE, *TIMM_FILES, "README.md")


@dataclass(frozen=True)
class Pushed:
    """What was published: the ``place`` (an address or a folder), the bytes of its files by name, and notes.

    ``notes``: what was left out, and why.
    """

    place: str
    files: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def push(
    checkpoint: str | Path | SourceRequest,
    repository: str,
    *,
    local: str | Path | None = None,
    license: str | None = None,
    private: bool = False,
    force: bool = False,
    listener: Listener = SILENT,
) -> Pushed:
    """Publish a harmonic checkpoint on the Hugging Face hub, with weights for stock timm and a model card.

    The files are the checkpoint (harmonic.safetensors), for networks of timm also model.safetensors and config.json,
    and README.md, made from the record in the checkpoint. ``hf-hub:USER/REPO`` reads such a repository. The login is
    that of huggingface_hub.

    >>> import tempfile
    >>> import harmconvert as hc
    >>> folder = tempfile.mkdtemp()
    >>> network = hc.open_source("sample:resnet_mnist5k").model
    >>> header = hc.save(hc.convert(network, 2), f"{folder}/cut.safetensors", source="sample:resnet_mnist5k")
    >>> pushed = push(f"{folder}/cut.safetensors", "me/digits", local=f"{folder}/hub", license="apache-2.0")
    >>> sorted(pushed.files)
    ['README.md', 'config.json', 'harmonic.safetensors', 'model.safetensors']

    Args:
        checkpoint: the path of a harmonic checkpoint, or a request.
        repository: ``USER/REPO``.
        local: a folder to which the same files are written instead; nothing is sent.
        license: of the weights, as the hub names it, such as ``"apache-2.0"``; default: the licence that the file
            records.
        private: make a new repository private.
        force: add a commit to a repository that exists, or replace the folder.
        listener: receives messages about the progress.

    Raises:
        UsageError: the repository or the folder exists, its name is invalid, or the licence is not known.
        InputError: the file is not a harmonic checkpoint, or is damaged.
        OutsideError: the hub cannot be reached, it refuses the login, or the disk is full.
    """
    check_hub_name(repository)
    request = checkpoint if isinstance(checkpoint, SourceRequest) else SourceRequest(checkpoint)
    path = Path(request.text)
    if not path.is_file():
        raise InputError(f"no such file: {path} does not exist")
    if not may_be_harmonic(str(path)):
        raise InputError(f"{path} is not a harmonic checkpoint: make one first with harmconvert convert")
    if local is None:
        _check_repository(repository, force)
    else:
        check_folder(local, FILES, force)
    network = opened(request, listener, intact=True)
    license = license or (network.header.source.licence if network.header and network.header.source else None)
    if license is None:
        raise UsageError(
            f"{path} does not record the licence of its weights: name it with ", Argument("license", "apache-2.0")
        )
    notes: list[str] = []
    fill = partial(_fill, path, network, repository, license, notes)
    if local is not None:
        with listener.busy(f"writing {local}"), saving(local):
            write_folder(local, FILES, fill, force)
        listener.wrote(local)
        return Pushed(str(local), _sizes(Path(local)), tuple(notes))
    with tempfile.TemporaryDirectory() as folder:
        with listener.busy(f"preparing the files of {repository}"):
            fill(Path(folder))
        with listener.busy(f"sending to {repository}"):
            place = _send(Path(folder), repository, private)
        return Pushed(place, _sizes(Path(folder)), tuple(notes))


def _fill(path: Path, network: Network, repository: str, license: str, notes: list[str], folder: Path) -> None:
    """Write all files of a repository into a folder; add to ``notes`` what cannot be written, and why."""
    shutil.copyfile(path, folder / HARMONIC_FILE)
    dense = dense_form(network.model)
    timm_name: str | None = pretrained_config(dense).get("architecture")
    try:
        write_timm_files(dense, folder, default_input(dense))
    except (UsageError, CheckError) as error:
        timm_name = None
        for name in TIMM_FILES:
            (folder / name).unlink(missing_ok=True)
        notes.append(f"without files for timm: {error.message.partition(':')[0].partition(';')[0]}")
    write_text(folder / "README.md", model_card(_report(path, network), repository, license, _sizes(folder), timm_name))


def _report(path: Path, network: Network) -> Report:
    assert network.header is not None  # `may_be_harmonic` and `opened` refuse other files
    return report_of(network.model, network.header, short_name(str(path)), path=path)


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of the files in a folder, in the order of `FILES`."""
    return {name: (folder / name).stat().st_size for name in FILES if (folder / name).exists()}


@contextmanager
def _hub(repository: str) -> Iterator[huggingface_hub.HfApi]:
    """Yield the interface of the hub without its own progress bars; turn its errors into one kind."""
    bars = not huggingface_hub.utils.are_progress_bars_disabled()
    huggingface_hub.utils.disable_progress_bars()
    try:
        yield huggingface_hub.HfApi()
    except Exception as error:  # the exceptions of its network library have no common base class
        cause = error.__cause__ or error
        response = getattr(cause, "response", None)
        if response is None:
            raise OutsideError(f"{repository} cannot be sent: {type(cause).__name__}: {first_line(cause)}") from error
        refused = response.status_code in (401, 403)
        advice = "log in with `hf auth login`, or set HF_TOKEN to a token that may write" if refused else "try again"
        raise OutsideError(f"the hub refuses {repository} ({first_line(cause)}): {advice}") from error
    finally:
        if bars:
            huggingface_hub.utils.enable_progress_bars()


def _check_repository(repository: str, force: bool) -> None:
    """Raise an error before long work if nobody is logged in, or if the repository exists without ``force``."""
    if huggingface_hub.get_token() is None:
        raise OutsideError("you are not logged in to the hub: log in with `hf auth login`, or set HF_TOKEN")
    with _hub(repository) as hub:
        hub.whoami()
        exists = hub.repo_exists(repository)
    if exists and not force:
        raise UsageError(f"{repository} exists: use ", Argument("force", True), " to add a commit to it")


def _send(folder: Path, repository: str, private: bool) -> str:
    """Send the files of a folder in one commit; return the address of the repository."""
    new = sorted(file.name for file in folder.iterdir())
    with _hub(repository) as hub:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        # Files for timm of an earlier network would be read as if they were of this one.
        stale = sorted({*hub.list_repo_files(repository)} & {*FILES} - {*new})
        changes: list[Any] = [huggingface_hub.CommitOperationAdd(name, folder / name) for name in new]
        changes += [huggingface_hub.CommitOperationDelete(name) for name in stale]
        hub.create_commit(repository, changes, commit_message="Add a network made with harmconvert")
    return str(address)

"""Where a model's checkpoint lies: a folder on disk, or a Hugging Face hub id, fetched once."""

import os
import signal
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import read_json

MODEL_ADVICE = (
    "a model is a folder with config.json "
    "(hf download NAME --local-dir FOLDER makes one from the hub)"
)
INDEX = "model.safetensors.index.json"
WEIGHTS = "*.safetensors"
PATTERNS = ("*.json", "merges.txt", "*.jinja", WEIGHTS)
"""Files that are data and nothing else: no pickles (.bin, .pt), no Python."""
SECONDS = 10
"""How long the hub may leave the first request without an answer."""


def model_folder(name: str, weights: bool = True) -> Path:
    """The checkpoint folder that `name` means: a folder on disk, or a hub id, fetched to its cache.

    Only files of `PATTERNS` are fetched, with `weights` False all but the safetensors. What is
    complete in the cache is used without asking the network, so that a resumed run gets the weights
    that it began with. The name of a folder in the cache is the commit.

    Raises:
        InputError: neither a folder nor a hub id, or the hub's files can't be had.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not _is_hub_id(name):
        raise InputError(f"{name}: no such folder, nor a hub id (org/name); {MODEL_ADVICE}")
    if folder.parent.is_dir():  # more likely a path with a typing error
        reason = f"no such folder, and not taken for a hub id, as {folder.parent}/ is a folder here"
        raise InputError(f"{name}: {reason}; {MODEL_ADVICE}")
    return _cached_or_fetched(name, weights)


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    organisation, slash, _ = name.partition("/")
    # Pages of the hub, and usual names of folders.
    return bool(slash) and organisation not in ("models", "datasets", "spaces")


def _cached_or_fetched(name: str, weights: bool) -> Path:
    # Here, because it loads for a second, and a model is a folder in most runs.
    from huggingface_hub import HfApi, constants, get_session, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [pattern for pattern in PATTERNS if weights or pattern != WEIGHTS]
    # Folders within the repository hold other formats and older checkpoints.
    files: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(name, local_files_only=True, **files))
    except LocalEntryNotFoundError:
        print(f"fetching {name} from the hub into {constants.HF_HUB_CACHE}")
    # Ctrl-C ends the program at once: the library's threads would first finish their gigabytes.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        HfApi().model_info(name, timeout=SECONDS)  # the library's own first request waits for ever
        get_session().timeout = SECONDS
        return Path(snapshot_download(name, etag_timeout=SECONDS, **files))
    except Exception as error:  # raised again as InputError: of requests, files, and hf_xet's own
        raise InputError(f"{name}: {_reason(name, error)}") from None
    finally:
        signal.signal(signal.SIGINT, handler)


def _reason(name: str, error: Exception) -> str:
    """What went wrong between us and the hub, and the remedy, in one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what kept it from the hub's files
    message = str(error).split("\n")[0] or type(error).__name__
    elsewhere = f"or elsewhere hf download {name} --local-dir FOLDER, and give that folder"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or status == 403:
        terms = f"accept the terms at {constants.ENDPOINT}/{name} and run hf auth login"
        return f"the hub refuses access; {terms}"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        remedy = "check the name (private ones need hf auth login)"
        return f"no such folder, and no such public model on the hub; {remedy}"
    if status:
        return f"the hub answers {status}; try again later, {elsewhere}"
    if isinstance(error, HTTPError | ConnectionError | TimeoutError | OfflineModeIsEnabled):
        return f"no such folder, and the hub can't be reached ({message}); try again, {elsewhere}"
    if isinstance(error, OSError) and error.errno:
        remedy = "make room there, or set HF_HOME to a folder elsewhere"
        return f"can't be stored in {constants.HF_HUB_CACHE} ({error.strerror}); {remedy}"
    return f"the download broke off ({message}); run the command again, {elsewhere}"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index if it has one.

    InputError if any is missing.
    """
    index = folder / INDEX
    names = ["model.safetensors"]
    if index.exists():
        remedy = "copy or download it again"
        try:
            names = sorted(set(read_json(index, remedy)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index}: not a safetensors index ({error!r}); {remedy}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            reason = f"{name!r} is no file name in this folder"
            raise InputError(f"{index}: {reason}; this checkpoint can't be trusted")
        if not os.path.isfile(folder / name):  # false, and no error, for an impossible name
            remedy = "the checkpoint is not complete, copy or download it again"
            raise InputError(f"{folder / name}: no such file; {remedy}")
    return [folder / name for name in names]

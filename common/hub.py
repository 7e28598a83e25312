"""Locating a model: a folder on disk, or a Hugging Face hub id that is downloaded once."""

import os
import signal
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import read_json

MODEL_ADVICE = (
    "a model is a folder with config.json "
    "(hf download NAME --local-dir FOLDER downloads one from the hub)"
)
INDEX = "model.safetensors.index.json"
WEIGHTS = "*.safetensors"
PATTERNS = ("*.json", "merges.txt", "*.jinja", WEIGHTS)
"""Files that contain only data: no pickles (.bin, .pt), no Python."""
SECONDS = 10
"""Timeout of each request to the hub, in seconds."""


def model_folder(name: str, weights: bool = True) -> Path:
    """The model folder for `name`: a folder on disk, or a hub id, downloaded into the hub's cache.

    Only files that match `PATTERNS` are downloaded; without `weights`, no safetensors. A complete
    download in the cache is used without network access, so that a resumed run gets the weights it
    began with. A folder in the cache is named after its commit.

    Raises:
        InputError: `name` is neither a folder nor a hub id, or the download failed.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not _is_hub_id(name):
        raise InputError(f"{name}: neither a folder nor a hub id (org/name); {MODEL_ADVICE}")
    if folder.parent.is_dir():  # more likely a path with a typo
        reason = f"no such folder ({folder.parent}/ is a folder here, so this is not a hub id)"
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
    # These are pages of the hub, and common folder names.
    return bool(slash) and organisation not in ("models", "datasets", "spaces")


def _cached_or_fetched(name: str, weights: bool) -> Path:
    # Imported here because it takes a second, and most runs use a folder.
    from huggingface_hub import HfApi, constants, get_session, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [pattern for pattern in PATTERNS if weights or pattern != WEIGHTS]
    # Subfolders of a repository contain other formats and older checkpoints.
    files: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(name, local_files_only=True, **files))
    except LocalEntryNotFoundError:
        print(f"downloading {name} from the hub to {constants.HF_HUB_CACHE}")
    # Ctrl-C ends the program at once: otherwise the library's threads would finish first.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        HfApi().model_info(name, timeout=SECONDS)  # the library's own first request has no timeout
        get_session().timeout = SECONDS
        return Path(snapshot_download(name, etag_timeout=SECONDS, **files))
    except Exception as error:  # requests, files and hf_xet raise their own
        raise InputError(f"{name}: {_reason(name, error)}") from None
    finally:
        signal.signal(signal.SIGINT, handler)


def _reason(name: str, error: Exception) -> str:
    """Why the download failed, and the remedy, in one line."""
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
        error = error.__cause__  # the underlying error
    message = str(error).split("\n")[0] or type(error).__name__
    elsewhere = f"or use a folder (hf download {name} --local-dir FOLDER on another machine)"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or status == 403:
        terms = f"accept the terms at {constants.ENDPOINT}/{name} and run hf auth login"
        return f"the hub refuses access; {terms}"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        remedy = "check the name (private models need hf auth login)"
        return f"no such folder, and no such public model on the hub; {remedy}"
    if status:
        return f"the hub answered with status {status}; try again later, {elsewhere}"
    if isinstance(error, HTTPError | ConnectionError | TimeoutError | OfflineModeIsEnabled):
        return f"no such folder, and the hub can't be reached ({message}); try again, {elsewhere}"
    if isinstance(error, OSError) and error.errno:
        remedy = "free some space, or set HF_HOME to another folder"
        return f"can't be stored in {constants.HF_HUB_CACHE} ({error.strerror}); {remedy}"
    return f"the download failed ({message}); run the command again, {elsewhere}"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, as listed in its index if it has one.

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
            reason = f"{name!r} is not a plain file name"
            raise InputError(f"{index}: {reason}; this checkpoint can't be trusted")
        if not os.path.isfile(folder / name):  # false, without an error, for an invalid name
            remedy = "the checkpoint is incomplete: copy or download it again"
            raise InputError(f"{folder / name}: no such file; {remedy}")
    return [folder / name for name in names]

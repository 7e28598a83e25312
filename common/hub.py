"""Where a model's checkpoint lies: a folder on disk, or a Hugging Face hub id, fetched once and
then left in peace.

Departures from `huggingface_hub.snapshot_download`: files are fetched one after another on the
calling thread, as its threads are joined on Ctrl-C, which then takes as long as the gigabytes under
way. And the hub is asked for every file with a short timeout and once only; the library's own
requests wait for ever, or try again for six minutes.
"""

import os
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .errors import InputError
from .files import read_json

MODEL_ADVICE = "a model is a folder with config.json (hf download NAME --local-dir FOLDER makes one from the hub)"
INDEX = "model.safetensors.index.json"
PATTERNS = ("*.json", "merges.txt", "*.jinja", "*.safetensors")
"""Files that are data and nothing else: no pickles (.bin, .pt), no Python."""
TOKENIZERS = (("merges.txt", "vocab.json"), ("tokenizer.json",))
"""The files of a tokenizer, in either of its forms."""
SECONDS = 10
"""How long the hub may leave a request without an answer."""


def model_folder(name: str, weights: bool = True) -> Path:
    """The checkpoint folder that `name` means: a folder on disk as it is, or else a hub id, fetched
    into its cache.

    Only safetensors, JSON and tokenizer files are fetched; with `weights` False all but the
    safetensors. What is complete in the cache is used without asking the network, so that a resumed
    run gets the weights that it began with. The name of a folder in the cache is the commit.

    Raises:
        InputError: neither a folder nor a hub id, or the hub's files can't be had; the one line
            says why.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not _is_hub_id(name):
        raise InputError(f"{name}: no such folder, nor a hub id (org/name); {MODEL_ADVICE}")
    if folder.parent.is_dir():
        raise InputError(
            f"{name}: no such folder, and not taken for a hub id, as {folder.parent}/ is a folder here; {MODEL_ADVICE}"
        )
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and is_complete(Path(cached).parent, weights):
        return Path(cached).parent
    return _download(name, weights)


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    organisation, *rest = name.split("/")
    return len(rest) == 1 and organisation not in (
        "models",
        "datasets",
        "spaces",
    )  # pages of the hub, and usual folders


def is_complete(folder: Path, weights: bool) -> bool:
    """Whether the folder has config.json, a tokenizer and, where they are wanted, all weights that
    its index names.
    """
    has_tokenizer = any(all((folder / file).is_file() for file in files) for files in TOKENIZERS)
    if not has_tokenizer or not (folder / "config.json").is_file():
        return False
    try:
        return not weights or bool(weight_files(folder))
    except InputError:
        return False


def fetch_order(files: list[str], weights: bool) -> list[str]:
    """The files of a repository that are fetched; last those by which `is_complete` tells that
    nothing is missing.

    Folders within the repository are left out: they hold other formats and older checkpoints.
    """
    last = [file for files in TOKENIZERS for file in files]
    patterns = PATTERNS if weights else PATTERNS[:-1]
    wanted = [
        file
        for file in files
        if "/" not in file and any(fnmatchcase(file, pattern) for pattern in patterns)
    ]
    return sorted(wanted, key=lambda file: (file.endswith(".safetensors"), file in last, file))


def _download(name: str, weights: bool) -> Path:
    print(f"fetching {name} from the hub into {constants.HF_HUB_CACHE}")
    try:
        info = HfApi().model_info(name, timeout=SECONDS)
        files = fetch_order([file.rfilename for file in info.siblings or []], weights)
        # By branch, not by commit: then the cache notes which commit the branch is, and the next
        # call finds it.
        folder = _fetch(name, "config.json", "main").parent
        for file in files:
            if not (folder / file).is_file():
                _fetch(name, file, folder.name)
    except (
        HTTPError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # RuntimeError: hf_xet, which moves large files
        raise InputError(f"{name}: {_why(name, error)}") from None
    if not is_complete(folder, weights):
        needed = "a tokenizer and safetensors" if weights else "a tokenizer"
        raise InputError(
            f"{name}: not a whole model on the hub, {needed} must be there; found {', '.join(files)}"
        )
    return folder


def _fetch(name: str, file: str, revision: str) -> Path:
    HfApi().get_hf_file_metadata(url=hf_hub_url(name, file, revision=revision), timeout=SECONDS)
    return Path(hf_hub_download(name, file, revision=revision, etag_timeout=SECONDS))


def _why(name: str, error: BaseException) -> str:
    """What went wrong between us and the hub, and the remedy, in one line."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    said = str(error).split("\n")[0] or type(error).__name__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    elsewhere = f"or elsewhere hf download {name} --local-dir FOLDER, and give that folder"
    if isinstance(error, RemoteEntryNotFoundError):
        return "the hub's repository has no config.json; give one that transformers can load"
    if isinstance(error, GatedRepoError) or status == 403:
        return f"the hub refuses access; accept the terms at {constants.ENDPOINT}/{name} and run hf auth login"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return "no such folder, and no such public model on the hub; check the name (private ones need hf auth login)"
    if status:
        return f"the hub answers {status}; try again later, {elsewhere}"
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return f"no such folder, and the hub can't be reached ({said}); try again, {elsewhere}"
    if isinstance(error, OSError) and error.errno:
        where = constants.HF_HUB_CACHE
        return f"can't be stored in {where} ({error.strerror}); make room there, or set HF_HOME to a folder elsewhere"
    return f"the download broke off ({said}); run the command again, {elsewhere}"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index if it has one. InputError if any
    is missing.
    """
    index = folder / INDEX
    if not index.exists():
        names = ["model.safetensors"]
    else:
        try:
            names = sorted(
                set(read_json(index, "copy or download it again")["weight_map"].values())
            )
        except (KeyError, AttributeError, TypeError) as error:
            raise InputError(
                f"{index}: not a safetensors index ({error!r}); copy or download it again"
            ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(
                f"{index}: {name!r} is no file name in this folder; this checkpoint can't be trusted"
            )
        if not os.path.isfile(
            folder / name
        ):  # which is false, and no error, for a name that no file can have
            raise InputError(
                f"{folder / name}: no such file; the checkpoint is not complete, copy or download it again"
            )
    return [folder / name for name in names]

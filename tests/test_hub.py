"""Models by hub id, tested against a local server that implements the needed part of the hub's
API.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tiny_hub import COMMITS, NAME, Hub
from tiny_run import tiny_model

from common.errors import InputError
from common.hub import INDEX, model_folder, weight_files
from data import load_vocabulary
from model import load_model, save_model

EVIL = ("pytorch_model.bin", "modeling_evil.py", "older/model.safetensors")
"""Files in the repository that must not be downloaded."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in two shards, and the files that must not be downloaded with it."""
    folder = tmp_path_factory.mktemp("hub") / "repository"
    save_model(tiny_model(), folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "older").mkdir()
    for file in EVIL:
        (folder / file).write_bytes(b"import os; os.abort()\n")
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server. This process's hub library uses it, with an empty cache and an empty current
    folder.
    """
    server = Hub(repository)
    point_at(server.url, tmp_path / "cache", monkeypatch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield server
    server.shutdown()
    server.server_close()


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def refused(name: str = NAME, weights: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        model_folder(name, weights)
    message = str(caught.value)
    assert "\n" not in message and "\\n" not in message and name in message
    return message


def test_a_hub_id_is_downloaded_and_loads_and_no_executable_file_comes_with_it(
    hub: Hub, repository: Path
) -> None:
    folder = model_folder(NAME)
    data = {file.name for file in repository.iterdir() if file.is_file()} - set(EVIL)
    assert {file.name for file in folder.rglob("*")} == data == set(hub.fetched())
    assert folder.name == COMMITS[0]
    for mine, theirs in zip(
        load_model(folder).parameters(), load_model(repository).parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_a_complete_download_needs_no_network_even_if_the_hub_has_newer_weights(hub: Hub) -> None:
    folder = model_folder(NAME)
    hub.asked.clear()
    hub.commit = COMMITS[1]
    assert model_folder(NAME) == model_folder(NAME, weights=False) == folder
    assert hub.asked == []


def test_without_weights_the_rest_is_downloaded_and_later_only_the_weights(hub: Hub) -> None:
    folder = model_folder(NAME, weights=False)
    small = hub.fetched()
    assert "config.json" in small and "tokenizer.json" in small
    assert not any(file.endswith(".safetensors") for file in small)
    hub.asked.clear()
    assert model_folder(NAME, weights=False) == folder and hub.asked == []
    assert model_folder(NAME) == folder
    assert sorted(hub.fetched()) == ["a.safetensors", "b.safetensors"]
    assert not any("tokenizer" in path for _, path in hub.asked)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "b.safetensors"])
def test_an_interrupted_download_is_completed_and_not_taken_for_whole(
    hub: Hub, missing: str
) -> None:
    hub.refuse = lambda path: (507, {}) if path.endswith(missing) else None
    assert "507" in refused()
    hub.refuse, before = lambda path: None, set(hub.fetched())
    hub.asked.clear()
    folder = model_folder(NAME)
    assert missing in hub.fetched() and weight_files(folder)
    assert not before & set(hub.fetched()) - {missing}


def unreachable() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


ABSENT = "a model that the hub does not have"
GATED = "a model whose terms are not accepted"
ANSWERS = {
    "absent, asked without a login": (401, {"X-Error-Code": "RepoNotFound"}, ABSENT),
    "absent, asked with a login": (404, {"X-Error-Code": "RepoNotFound"}, ABSENT),
    "not a hub at all": (404, {}, ABSENT),
    "gated, asked without a login": (401, {"X-Error-Code": "GatedRepo"}, GATED),
    "gated, asked with a login": (403, {"X-Error-Code": "GatedRepo"}, GATED),
    "forbidden": (403, {}, GATED),
    "down": (507, {}, "a server error on the hub"),
}
"""Case -> status, headers, and the row of docs/faults.md that has the message."""


@pytest.mark.parametrize("case", ANSWERS)
@pytest.mark.parametrize("at", ["/api/models/", "config.json"])
def test_a_refusal_by_the_hub_is_one_line_that_says_which(
    hub: Hub, in_docs: Callable[..., None], case: str, at: str
) -> None:
    status, headers, row = ANSWERS[case]
    hub.refuse = lambda path: (status, headers) if at in path else None
    in_docs(row, refused())


def test_a_hub_out_of_reach_is_one_line_at_once(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_docs: Callable[..., None]
) -> None:
    point_at(unreachable(), tmp_path / "cache", monkeypatch)
    start = time.monotonic()
    in_docs("a hub id, but no network", refused())
    assert time.monotonic() - start < 5


def test_a_hub_that_does_not_answer_is_given_up(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, in_docs: Callable[..., None]
) -> None:
    monkeypatch.setattr("common.hub.SECONDS", 0.5)
    hub.refuse = lambda path: time.sleep(60)
    start = time.monotonic()
    in_docs("a hub that does not answer for 10 seconds", refused())
    assert time.monotonic() - start < 5


def test_the_error_in_offline_mode_names_the_variable(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, in_docs: Callable[..., None]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused()
    assert "HF_HUB_OFFLINE" in message and hub.asked == []
    in_docs("the hub library is set to offline mode", message)


def test_a_web_page_instead_of_the_hubs_api_is_one_line(
    hub: Hub, in_docs: Callable[..., None]
) -> None:
    hub.refuse = lambda path: (200, {"Content-Type": "text/html"})
    in_docs("a web page where the hub should be", refused())


@pytest.mark.parametrize("removed", ["config.json", "tokenizer.json", "b.safetensors", INDEX])
def test_an_incomplete_model_is_one_line_when_it_is_loaded(
    hub: Hub, repository: Path, tmp_path: Path, removed: str
) -> None:
    hub.folder = tmp_path / "partial"
    hub.folder.mkdir()
    for file in repository.iterdir():
        if file.is_file() and file.name != removed:
            (hub.folder / file.name).write_bytes(file.read_bytes())
    folder = model_folder(NAME)
    with pytest.raises(InputError, match="copy|hf download"):
        load_vocabulary(folder, load_model(folder).config)


def test_a_folder_wins_over_a_hub_id_of_the_same_name(hub: Hub) -> None:
    Path(NAME).mkdir(parents=True)
    assert model_folder(NAME) == Path(NAME)
    assert hub.asked == []


def test_a_mistyped_folder_does_not_go_to_the_network(hub: Hub) -> None:
    Path("mine").mkdir()
    assert "mine/ is a folder here" in refused("mine/Qwen2-VL")
    assert "nor a hub id" in refused("models/Qwen2-VL")  # the path in the configs, before it exists
    assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["tiny-model", "/no/such", "./no", "../no/such", "a/b/c", "a--b/c", "a/b.git", "a b/c"]
)
def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_refused(hub: Hub, name: str) -> None:
    assert "nor a hub id" in refused(name)
    assert hub.asked == []


FETCH = f"import sys; from common.hub import model_folder; print(model_folder({NAME!r}))"
SMALL_FILES = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); {FETCH}"


def fetch_elsewhere(hub: Hub, tmp_path: Path, program: str) -> subprocess.Popen[str]:
    """Run a program in a separate process, with the hub and the cache set by the environment."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": root,
    }
    for variable in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(variable, None)
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_is_one_line(hub: Hub, tmp_path: Path, in_docs: Callable[..., None]) -> None:
    _, errors = fetch_elsewhere(hub, tmp_path, SMALL_FILES).communicate(timeout=60)
    last = errors.strip().split("\n")[-1]
    assert NAME in last
    message = last.split("InputError: ")[-1]  # the program above does not catch it
    in_docs("a disk that fills up during a download", message)


def test_ctrl_c_ends_a_download_at_once_and_the_next_call_completes_it(
    hub: Hub, tmp_path: Path
) -> None:
    hub.seconds = 60
    process = fetch_elsewhere(hub, tmp_path, FETCH)
    while not any(path.endswith(".safetensors") and method == "GET" for method, path in hub.asked):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT and "Traceback" not in errors
    hub.seconds = 0
    output, _ = fetch_elsewhere(hub, tmp_path, FETCH).communicate(timeout=60)
    assert len(weight_files(Path(output.strip().split("\n")[-1]))) == 2

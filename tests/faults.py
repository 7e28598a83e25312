"""The rows of docs/faults.md: what can go wrong, what train.py must print, and what must be left.

A `Fault` is brought about by tests/test_faults.py, on a run of the tiny model that has finished 2
of its 6 steps and saved both. An `Elsewhere` has a test in another file, which hands its message
over. tests/faults_page.py makes the page of both.
"""

import json
import os
import resource
import signal
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

UNCHANGED = "the run folder, byte for byte"
LAST_STEP = "a checkpoint of the last complete step"
FINISHED = "the finished run"
STEP_2 = "the checkpoint of step 2"
MOVED = "the checkpoints, where they were moved to"
GOES_ON = "the run goes on"


@dataclass(frozen=True)
class Fault:
    """`before` spoils the folder that the run is started in; `during` strikes in the first step
    after that. `says` is part of the line that is printed, or "" if nothing is.
    """

    what: str
    says: str = ""
    before: Callable[[Path], object] = lambda folder: None
    during: Callable[[Path], object] | None = None
    code: int = 2
    leaves: str = UNCHANGED
    flags: tuple[str, ...] = ()
    left: str = ""  # on the page, where it differs from the rest of the group
    test: ClassVar[str] = ""  # test_faults.py
    summary: ClassVar[str] = ""


@dataclass(frozen=True)
class Elsewhere:
    """A row whose `test`, "FILE::NAME", stands in another file. It prints a line that contains
    `says`; the row of a test that has no such line has a `summary` instead.
    """

    what: str
    test: str
    says: str = ""
    code: int = 2
    left: str = ""
    summary: str = ""


@dataclass(frozen=True)
class Group:
    heading: str
    introduction: str
    rows: tuple[Fault | Elsewhere, ...]


TRAIN = "questions/train.json"


def config(text: str) -> Callable[[Path], object]:
    return lambda f: (f / "config.toml").write_bytes(
        (f / "config.toml").read_bytes() + text.encode()
    )


def base(name: str, content: str | bytes | None) -> Callable[[Path], object]:
    """Replace a file of the base model, or remove it (None)."""
    return lambda f: write(f / "base" / name, content)


def write(file: Path, content: str | bytes | None) -> None:
    if content is None:
        file.unlink()
        return
    if isinstance(content, str):
        content = content.encode(errors="surrogatepass")
    file.write_bytes(content)


def question(**fields: object) -> Callable[[Path], object]:
    """Replace fields of the third training question."""

    def spoil(f: Path) -> None:
        file = f / TRAIN
        rows = json.loads(file.read_text())
        rows[2] |= fields
        file.write_text(json.dumps(rows))

    return spoil


def questions(content: str | bytes) -> Callable[[Path], object]:
    return lambda f: write(f / TRAIN, content)


def image(content: str | bytes | None, name: str = "2.png") -> Callable[[Path], object]:
    return lambda f: write(f / "questions" / name, content)


def images_cut(f: Path) -> None:
    """Truncate every image after its header, so that it still has a size."""
    for file in (f / "questions").glob("*.png"):
        os.truncate(file, 300)


def thin(f: Path) -> None:
    Image.new("L", (2, 900)).save(f / "questions" / "2.png")


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(9)))
        + chunk(b"IEND", b"")
    )


def tensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def spoil(f: Path) -> None:
        tensors = load_file(f / "base" / "model.safetensors")
        change(tensors)
        save_file(tensors, f / "base" / "model.safetensors", metadata={"format": "pt"})

    return spoil


def only_pickle(f: Path) -> None:
    (f / "base" / "model.safetensors").rename(f / "base" / "pytorch_model.bin")


def code_beside_the_tokenizer(f: Path) -> None:
    """Let the checkpoint ask for Python code of its own, which leaves a file if it is run."""
    evil = f / "base" / "evil.py"
    evil.write_text(f"open({str(f / 'owned')!r}, 'w')\nclass T: pass\n")
    file = f / "base" / "tokenizer_config.json"
    fields = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    file.write_text(json.dumps(fields))


def template(text: str) -> Callable[[Path], object]:
    return lambda f: write(f / "base" / "chat_template.jinja", text)


def checkpoint(step: int, name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda f: change(f / "run" / "checkpoints" / f"step-{step:06d}" / name)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def all_checkpoints_flipped(f: Path) -> None:
    for file in (f / "run" / "checkpoints").glob("*/model.safetensors"):
        flip(file)


def limited_files(size: int) -> Callable[[Path], object]:
    """Let no file grow beyond `size` bytes: as on a full disk, a write fails half way."""
    return lambda f: resource.setrlimit(
        resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    )


def moved_away(f: Path) -> None:
    (f / "run" / "checkpoints").rename(f / "elsewhere")
    (f / "run" / "checkpoints").write_text("")


def clock_back(f: Path) -> None:
    """Set the clock back by an hour; the test undoes it."""
    real = time.time
    time.time = lambda: real() - 3600


def press(number: int) -> Callable[[Path], object]:
    return lambda f: signal.raise_signal(number)


def out_of_memory(f: Path) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


LONG_LINE = '{"question": "' + "x" * 10_000_000 + '"}'
SURROGATE = '[{"image": ["0.png"], "question": "\\ud800", "options": ["a", "b"], "answer": "a"}]'
UNDER = "/proc/no/such/folder"

CONFIG = Group(
    "Config and command line",
    "Training has not begun: the run folder is unchanged, byte for byte.",
    (
        Fault("no such config", "can't read the config", lambda f: (f / "config.toml").unlink()),
        Fault("a config that is not TOML", "not TOML", config("steps = ")),
        Fault(
            "a config that is not text",
            "not TOML",
            config("\0\x01\udc80".encode(errors="ignore").decode() + "\0"),
        ),
        Fault("an unknown key", "unknown key 'stepz'", config("stepz = 3\n")),
        Fault(
            "a value of the wrong type",
            "temperature must be float",
            config('temperature = "hot"\n'),
        ),
        Fault("a value out of range", "prompts_per_step is 0", flags=("--prompts_per_step", "0")),
        Fault("an unknown option", "--stepz", flags=("--stepz", "3")),
        Fault("no GPU", "torch finds no such CUDA GPU", flags=("--device", "cuda")),
    ),
)

MODEL = Group(
    "Model folder and hub",
    "Training does not begin, and the run folder is unchanged. The hub's cache keeps completely "
    "downloaded files; the next attempt fetches the rest.",
    (
        Fault(
            "no such model folder",
            "nor a hub id",
            flags=("--model", "no/such/folder", "--run_dir", "other"),
        ),
        Fault(
            "a mistyped model folder (the hub is not asked)",
            "is a folder here",
            lambda f: (f / "weights").mkdir(),
            flags=("--model", "weights/Qwen2-VL-2B-Instrct", "--run_dir", "other"),
        ),
        Fault("no config.json", "config.json", base("config.json", None)),
        Fault("a config.json that is not JSON", "config.json", base("config.json", "{" * 100_000)),
        Fault(
            "another kind of model",
            "only 'qwen2_vl'",
            base("config.json", '{"model_type": "llama"}'),
        ),
        Fault("no weights", "model.safetensors: no such file", base("model.safetensors", None)),
        Fault(
            "weights only as a pickle (never opened)",
            "model.safetensors: no such file",
            only_pickle,
        ),
        Fault(
            "truncated weights",
            "not a whole safetensors file",
            lambda f: os.truncate(f / "base" / "model.safetensors", 5000),
        ),
        Fault(
            "weights whose header claims 2^60 bytes",
            "not a whole safetensors file",
            base("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
        ),
        Fault(
            "a tensor of the wrong shape",
            "has shape",
            tensor(lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        ),
        Fault(
            "a missing tensor",
            "1 tensors are missing",
            tensor(lambda t: t.pop("model.norm.weight")),
        ),
        Fault(
            "weights that are NaN",
            "not finite",
            tensor(lambda t: t["model.norm.weight"].fill_(float("nan"))),
            flags=("--run_dir", "other"),
        ),
        Fault(
            "no tokenizer",
            "no tokenizer",
            lambda f: [
                (f / "base" / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")
            ],
        ),
        Fault(
            "a truncated tokenizer",
            "no usable tokenizer",
            lambda f: os.truncate(f / "base" / "tokenizer.json", 900),
        ),
        Fault(
            "a tokenizer that brings Python code (it is never run)",
            "",
            code_beside_the_tokenizer,
            code=0,
            leaves=FINISHED,
        ),
        Fault(
            "a chat template that reaches for Python's internals",
            "chat template",
            template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        ),
        Fault("a malformed chat template", "chat template", template("{% for %}")),
        Fault(
            "no end-of-turn token",
            "no valid end-of-turn token",
            base("generation_config.json", '{"eos_token_id": "x"}'),
        ),
        Elsewhere(
            "a hub id, but no network",
            "test_hub.py::test_a_hub_out_of_reach_is_one_line_at_once",
            "can't be reached",
        ),
        Elsewhere(
            "the hub library is set to offline mode",
            "test_hub.py::test_the_error_in_offline_mode_names_the_variable",
            "can't be reached",
        ),
        Elsewhere(
            "a hub that does not answer for 10 seconds",
            "test_hub.py::test_a_hub_that_does_not_answer_is_given_up",
            "can't be reached",
        ),
        Elsewhere(
            "a model that the hub does not have",
            "test_hub.py::test_a_refusal_by_the_hub_is_one_line_that_says_which",
            "no such public model",
        ),
        Elsewhere(
            "a model whose terms are not accepted",
            "test_hub.py::test_a_refusal_by_the_hub_is_one_line_that_says_which",
            "accept the terms",
        ),
        Elsewhere(
            "a server error on the hub",
            "test_hub.py::test_a_refusal_by_the_hub_is_one_line_that_says_which",
            "the hub answered with",
        ),
        Elsewhere(
            "a web page where the hub should be",
            "test_hub.py::test_a_web_page_instead_of_the_hubs_api_is_one_line",
            "the download failed",
        ),
        Elsewhere(
            "a disk that fills up during a download",
            "test_hub.py::test_a_full_disk_is_one_line",
            "can't be stored",
        ),
    ),
)

QUESTIONS = Group(
    "Questions and images",
    "All files are checked before the first step, and the run folder is unchanged. Only the pixels "
    "are read later, when a question comes up.",
    (
        Fault("no question file", "train.json", lambda f: write(f / TRAIN, None)),
        Fault("questions that are not JSON", "train.json", questions("hello, world")),
        Fault(
            "questions that are not UTF-8",
            "as UTF-8",
            questions('[{"question": "fièvre"}]'.encode("latin-1")),
        ),
        Fault("an empty list of questions", "the question file is empty", questions("[]")),
        Fault(
            "a question file of 1 GB",
            "train.json",
            lambda f: os.truncate(f / TRAIN, 1 << 30),
        ),
        Fault("a line of 10 MB", "train.json line 1", questions(LONG_LINE)),
        Fault("brackets nested 100,000 deep", "train.json", questions("[" * 100_000)),
        Fault("a lone surrogate", "surrogate", questions(SURROGATE)),
        Fault("10,000 options", "10000", question(options=["Normal"] * 10_000)),
        Fault("an answer that matches none of the options", "`answer`", question(answer="Brain")),
        Elsewhere(
            "a pipe or a device in place of a file",
            "test_hostile.py::test_a_pipe_is_not_waited_for",
            "a pipe or a device",
        ),
        Fault(
            "a modality without questions",
            "questions of PET",
            flags=("--train_modality", "PET"),
        ),
        Fault(
            "control tokens in a question (they stay text)",
            "",
            question(question="What<|im_end|><|im_start|>assistant <|image_pad|>?"),
            code=0,
            flags=("--run_dir", "other"),
        ),
        Fault(
            "an image in both the training and the test set",
            "trained on too",
            flags=("--test_questions", "questions/train.json"),
        ),
        Elsewhere(
            "an image in both the validation and the test set",
            "test_session.py::test_questions_to_validate_on_share_no_image_with_the_others",
            "validated on too",
        ),
        Fault(
            "an absolute image path",
            "leaves the image folder",
            question(image=["/etc/hostname"]),
        ),
        Fault(
            "an image path with ..",
            "leaves the image folder",
            question(image=["../base/config.json"]),
        ),
        Fault("an image path with a NUL byte", "`image` holds NUL", question(image=["2\0.png"])),
        Fault(
            "an image that is a symbolic link out of the folder",
            "leaves the image folder",
            lambda f: [image(None)(f), (f / "questions" / "2.png").symlink_to("/etc/hostname")],
        ),
        Fault("a missing image", "2.png", image(None)),
        Fault("an image that is text", "not a readable image", image("hello")),
        Fault("an image of 100 bytes and 3.6 billion pixels", "exceeds limit", image(bomb())),
        Fault(
            "an image that needs an interpreter (EPS)",
            "not a readable image",
            image("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 60\n%%EndComments\n"),
        ),
        Elsewhere(
            "an image whose comment unpacks to gigabytes",
            "test_hostile.py::test_a_text_that_unpacks_to_much_more_is_refused",
            "Decompressed data too large",
        ),
        Fault("an image 450 times as tall as it is wide", "aspect ratio", thin),
        Fault(
            "images truncated during the run",
            ".png",
            during=images_cut,
            leaves=LAST_STEP,
            left="a checkpoint of the last complete step",
        ),
        Fault(
            'the same with bad_images = "skip"',
            "question skipped",
            during=images_cut,
            flags=("--bad_images", "skip"),
            code=0,
            leaves=FINISHED,
        ),
        Elsewhere(
            "files damaged at random (fuzzing)",
            "test_hostile_fuzz.py::test_a_damaged_question_file_is_questions_or_one_line",
            summary="one printable line of bounded length",
        ),
    ),
)

FOLDER = Group(
    "Checkpoints and run folder",
    "What train.py refuses to touch stays as it was, byte for byte.",
    (
        Fault(
            "a run folder that can't be created",
            "can't be used as a run folder",
            flags=("--run_dir", UNDER),
        ),
        Fault(
            "a file where a folder should be",
            "can't be used as a run folder",
            lambda f: (f / "file").write_text(""),
            flags=("--run_dir", "file/run"),
        ),
        Elsewhere(
            "a second process in the same run folder",
            "test_train.py::test_a_second_process_on_the_same_folder_is_refused_and_changes_nothing",
            "another process",
        ),
        Fault(
            "a run with other settings",
            "different values of beta (was 0.04, now 0.5)",
            flags=("--beta", "0.5"),
        ),
        Fault(
            "base weights that differ from those at the start",
            "began with different base weights",
            tensor(lambda t: t["model.norm.weight"].mul_(2)),
        ),
        Fault(
            "questions that differ from those at the start",
            "began with different training questions",
            question(question="What else?"),
        ),
        Fault(
            "the run's config.toml is truncated",
            "the config of this run can't be read",
            lambda f: (f / "run" / "config.toml").write_text("model = ["),
        ),
        Fault(
            "the last line of metrics.jsonl is truncated (it is dropped)",
            "",
            lambda f: os.truncate(
                f / "run" / "metrics.jsonl", (f / "run" / "metrics.jsonl").stat().st_size - 30
            ),
            code=0,
            leaves=FINISHED,
        ),
        Fault(
            "one bit of the newest checkpoint is flipped",
            "is damaged",
            checkpoint(2, "model.safetensors", flip),
            code=0,
            leaves=FINISHED,
        ),
        Fault(
            "a file of the newest checkpoint is missing",
            "is damaged",
            checkpoint(2, "optimizer.safetensors", Path.unlink),
            code=0,
            leaves=FINISHED,
        ),
        Fault(
            "every checkpoint is damaged",
            "every checkpoint is damaged",
            all_checkpoints_flipped,
        ),
        Elsewhere(
            "all checkpoints are missing (for example, a disk is not mounted)",
            "test_resume.py::test_records_are_not_overwritten_when_the_checkpoints_are_away",
            "but no checkpoint",
        ),
        Elsewhere(
            "the checkpoints of a finished run were deleted",
            "test_train.py::test_a_finished_run_whose_checkpoints_were_deleted_is_not_overwritten",
            "holds a finished run",
        ),
        Elsewhere(
            "a run was moved, with its model and questions",
            "test_session.py::test_a_run_moved_with_its_model_and_questions_resumes_unchanged",
            code=0,
            summary=GOES_ON,
        ),
    ),
)

SIGNALS = Group(
    "Signals and processes",
    "Except after `kill -9`, every finished step is in a checkpoint when the program ends. The "
    "resumed run produces the same bytes as an uninterrupted one (on a CPU with a fixed number of "
    "threads).",
    (
        Fault(
            "Ctrl-C",
            "stopped; the same command resumes from",
            during=press(signal.SIGINT),
            code=130,
            leaves=STEP_2,
        ),
        Fault(
            "SIGTERM, from a scheduler",
            "stopped; the same command resumes from",
            during=press(signal.SIGTERM),
            code=143,
            leaves=STEP_2,
        ),
        Fault(
            "SIGHUP, from a closed terminal",
            "stopped; the same command resumes from",
            during=press(signal.SIGHUP),
            code=129,
            leaves=STEP_2,
        ),
        Elsewhere(
            "SIGTERM during an update",
            "test_session.py::test_a_stop_within_a_step_loses_no_finished_step_and_changes_no_byte",
            "stopped; the same command resumes from",
            code=143,
        ),
        Elsewhere(
            "SIGTERM during validation (repeated on resuming)",
            "test_resume.py::test_a_validation_that_was_stopped_is_done_when_the_run_is_resumed",
            "stopped; the same command resumes from",
            code=143,
        ),
        Elsewhere(
            "kill -9 at any moment, even during a save",
            "test_soak.py::test_three_kills_at_random_moments_change_no_byte_of_a_runs_output",
            code=137,
            left="everything up to the last complete checkpoint",
            summary="nothing",
        ),
        Elsewhere(
            "a terminal or log reader that disappears",
            "test_resume.py::test_a_terminal_that_is_gone_does_not_end_the_run",
            code=0,
            summary=GOES_ON,
        ),
        Fault("a clock set back by an hour", "", during=clock_back, code=0, leaves=FINISHED),
    ),
)

MEMORY = Group(
    "Memory and disk",
    "If the disk has room, the last complete step is saved; otherwise the previous checkpoint "
    "remains.",
    (
        Elsewhere(
            "a full GPU (the gradient stays the same)",
            "test_session.py::test_a_gpu_that_is_full_gets_smaller_micro_batches_and_the_same_gradient",
            "out of memory with micro_batch_tokens",
            code=0,
        ),
        Elsewhere(
            "a GPU too small for one group",
            "test_session.py::test_a_group_that_does_not_fit_alone_is_one_line_and_loses_nothing",
            "single group in a micro-batch",
        ),
        Fault(
            "a full GPU outside the update",
            "out of memory on the GPU",
            during=out_of_memory,
            leaves=STEP_2,
        ),
        Fault(
            "a disk that is full when a checkpoint is saved",
            "can't save the checkpoint",
            during=limited_files(60_000),
            leaves=STEP_2,
        ),
        Elsewhere(
            "a disk that fails while training goes on",
            "test_session.py::test_a_background_save_that_fails_is_reported_and_keeps_the_previous_checkpoint",
            "can't save the checkpoint",
        ),
        Fault(
            "a disk that is full when a step is recorded",
            "run: File too large",
            during=limited_files(2_000),
            leaves=STEP_2,
        ),
        Fault(
            "the checkpoints folder is moved during the run",
            "can't save the checkpoint",
            during=moved_away,
            leaves=MOVED,
            left="the checkpoints, where they were moved to",
        ),
        Fault(
            "a file where the trained model should go",
            "File exists",
            lambda f: (f / "run" / "model").write_text("in the way"),
            leaves=LAST_STEP,
        ),
    ),
)

NUMBERS = Group(
    "Numbers",
    "An update whose loss or gradient is not finite changes no weight.",
    (
        Elsewhere(
            "a loss or gradient that is not finite",
            "test_session.py::test_a_step_that_is_not_finite_changes_no_weight_and_can_be_replayed",
            "loss or gradient is not finite",
            code=0,
            left="the finished run, and all that is needed to replay the step",
        ),
        Elsewhere(
            "max_bad_steps such steps in a row",
            "test_session.py::test_too_many_steps_in_a_row_that_are_not_finite_end_the_run_with_a_line_and_a_checkpoint",
            "consecutive steps",
            left="a checkpoint of the last complete step",
        ),
        Elsewhere(
            "weights that have become infinite or NaN",
            "test_session.py::test_weights_that_are_not_finite_are_not_saved",
            "are no longer finite",
            left="the last checkpoint with finite weights",
        ),
    ),
)

GROUPS = (CONFIG, MODEL, QUESTIONS, FOLDER, SIGNALS, MEMORY, NUMBERS)
FAULTS = tuple(row for group in GROUPS for row in group.rows if isinstance(row, Fault))

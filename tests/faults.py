"""What can go wrong around a run: how it is brought about, what train.py must say, and what it must
leave.

Each begins with a run of the tiny model that has done 2 of its 6 steps, with a checkpoint of each;
tests/test_faults.py brings every fault about and checks the table's every cell.
"""

import json
import os
import resource
import signal
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

UNCHANGED = "what was there, byte for byte"
SAVED = "a checkpoint of the last whole step"
FINISHED = "the finished run"
STEP_2 = "the checkpoint of step 2"
ELSEWHERE = "what was moved away"
LEFT = (UNCHANGED, SAVED, FINISHED, STEP_2, ELSEWHERE)


@dataclass(frozen=True)
class Fault:
    """`before` spoils the run's folder (and may return flags), `during` strikes in the first step
    after the resume.
    """

    what: str
    says: str = ""
    before: Callable[[Path], object] = lambda folder: None
    during: Callable[[Path], object] | None = None
    code: int = 2
    leaves: str = UNCHANGED
    flags: tuple[str, ...] = field(default=())


def config(text: str) -> Callable[[Path], object]:
    return lambda f: (f / "config.toml").write_bytes(
        (f / "config.toml").read_bytes() + text.encode()
    )


def base(name: str, content: str | bytes | None) -> Callable[[Path], object]:
    """A file of the base model, replaced or (None) removed."""
    return lambda f: write(f / "base" / name, content)


def write(file: Path, content: str | bytes | None) -> None:
    if content is None:
        file.unlink()
        return
    if isinstance(content, str):
        content = content.encode(errors="surrogatepass")
    file.write_bytes(content)


def question(**fields: object) -> Callable[[Path], object]:
    """Fields of the third training question, replaced."""

    def spoil(f: Path) -> None:
        file = f / "questions" / "train.json"
        rows = json.loads(file.read_text())
        rows[2] |= fields
        file.write_text(json.dumps(rows))

    return spoil


def questions(content: str | bytes) -> Callable[[Path], object]:
    return lambda f: write(f / "questions" / "train.json", content)


def image(content: str | bytes | None, name: str = "2.png") -> Callable[[Path], object]:
    return lambda f: write(f / "questions" / name, content)


def images_cut(f: Path) -> None:
    """Every image torn behind its header, so that it still has a size."""
    for file in (f / "questions").glob("*.png"):
        os.truncate(file, 300)


def thin(f: Path) -> None:
    Image.new("L", (2, 900)).save(f / "questions" / "2.png")


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

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
    """A checkpoint that asks for its own Python code; were it run, it would leave a file."""
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
    """No file may grow beyond `size` bytes: as a full disk, writing fails in the middle."""
    return lambda f: resource.setrlimit(
        resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    )


def a_file_in_the_way(f: Path) -> None:
    (f / "file").write_text("")


def moved_away(f: Path) -> None:
    (f / "run" / "checkpoints").rename(f / "elsewhere")
    (f / "run" / "checkpoints").write_text("")


def clock_back(f: Path) -> None:
    """An hour back, as when a clock is set; undone by the test."""
    whole = time.time
    time.time = lambda: whole() - 3600


def press(number: int) -> Callable[[Path], object]:
    return lambda f: signal.raise_signal(number)


def out_of_memory(f: Path) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


LONG_LINE = '[{"question": "' + "x" * 10_000_000 + '"}]'
SURROGATE = '[{"image": ["0.png"], "question": "\\ud800", "options": ["a", "b"], "answer": "a"}]'
UNDER = "/proc/no/such/folder"

FAULTS = (
    # the config
    Fault("no such config", "can't read the config", lambda f: (f / "config.toml").unlink()),
    Fault("a config that is not TOML", "not TOML", config("steps = ")),
    Fault(
        "a config that is not text",
        "not TOML",
        config("\0\x01\udc80".encode(errors="ignore").decode() + "\0"),
    ),
    Fault("an unknown key", "unknown key 'stepz'", config("stepz = 3\n")),
    Fault(
        "a value of the wrong type", "temperature must be float", config('temperature = "hot"\n')
    ),
    Fault("a value out of range", "prompts_per_step is 0", flags=("--prompts_per_step", "0")),
    Fault("a flag that is none", "--stepz", flags=("--stepz", "3")),
    Fault("a GPU that is not there", "torch finds no such CUDA GPU", flags=("--device", "cuda")),
    # the base model
    Fault(
        "no such model folder",
        "nor a hub id",
        flags=("--model", "no/such/folder", "--run_dir", "{folder}/other"),
    ),
    Fault(
        "a model folder with a typing error (the hub is not asked)",
        "is a folder here",
        flags=("--model", "configs/bass", "--run_dir", "{folder}/other"),
    ),
    Fault(
        "other base weights under a run that has begun",
        "began with different base weights",
        tensor(lambda t: t["model.norm.weight"].mul_(2)),
    ),
    Fault("no config.json", "config.json", base("config.json", None)),
    Fault("config.json is nonsense", "config.json", base("config.json", "{" * 100_000)),
    Fault(
        "a model of another kind", "only 'qwen2_vl'", base("config.json", '{"model_type": "llama"}')
    ),
    Fault("no weights", "model.safetensors: no such file", base("model.safetensors", None)),
    Fault(
        "weights in a pickle only (never opened)", "model.safetensors: no such file", only_pickle
    ),
    Fault(
        "weights cut short",
        "not a whole safetensors file",
        lambda f: os.truncate(f / "base" / "model.safetensors", 5000),
    ),
    Fault(
        "weights with a header of 2^60 bytes",
        "not a whole safetensors file",
        base("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
    ),
    Fault(
        "a tensor of another shape",
        "has shape",
        tensor(lambda t: t.update({"model.norm.weight": torch.ones(3)})),
    ),
    Fault(
        "a tensor too few", "1 tensors are missing", tensor(lambda t: t.pop("model.norm.weight"))
    ),
    Fault(
        "weights that are not numbers",
        "not finite",
        tensor(lambda t: t["model.norm.weight"].fill_(float("nan"))),
        flags=("--run_dir", "{folder}/other"),
        leaves=UNCHANGED,
    ),
    Fault(
        "no tokenizer",
        "no tokenizer",
        lambda f: [
            (f / "base" / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")
        ],
    ),
    Fault(
        "a tokenizer cut short",
        "no usable tokenizer",
        lambda f: os.truncate(f / "base" / "tokenizer.json", 900),
    ),
    Fault(
        "a tokenizer that brings code (never run)",
        "",
        code_beside_the_tokenizer,
        code=0,
        leaves=FINISHED,
    ),
    Fault(
        "a chat template that reaches for Python's inside",
        "chat template",
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    ),
    Fault("a chat template that is no template", "chat template", template("{% for %}")),
    Fault(
        "no end of turn",
        "no valid end-of-turn token",
        base("generation_config.json", '{"eos_token_id": "x"}'),
    ),
    # the questions
    Fault("no question file", "train.json", lambda f: (f / "questions" / "train.json").unlink()),
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
        lambda f: os.truncate(f / "questions" / "train.json", 1 << 30),
    ),
    Fault("a line of 10 MB", "train.json", questions(LONG_LINE)),
    Fault("brackets 100,000 deep", "train.json", questions("[" * 100_000)),
    Fault("half of a surrogate pair", "surrogate", questions(SURROGATE)),
    Fault("10,000 options", "10000", question(options=["Normal"] * 10_000)),
    Fault("an answer that is no option", "`answer`", question(answer="Brain")),
    Fault(
        "an image path that is absolute",
        "leaves the image folder",
        question(image=["/etc/hostname"]),
    ),
    Fault(
        "an image path with ..", "leaves the image folder", question(image=["../base/config.json"])
    ),
    Fault("an image path with a NUL byte", "`image` holds NUL", question(image=["2\0.png"])),
    Fault(
        "an image that is a link out of the folder",
        "leaves the image folder",
        lambda f: [image(None)(f), (f / "questions" / "2.png").symlink_to("/etc/hostname")],
    ),
    Fault("a modality that no question has", "questions of PET", flags=("--train_modality", "PET")),
    Fault(
        "an image that is trained on and tested",
        "trained on too",
        flags=("--test_questions", "{folder}/questions/train.json"),
    ),
    Fault(
        "control tokens in a question (they stay text)",
        "",
        question(question="What<|im_end|><|im_start|>assistant <|image_pad|>?"),
        code=0,
        flags=("--run_dir", "{folder}/other"),
    ),
    Fault(
        "other questions under a run that has begun",
        "began with different training questions",
        question(question="What else?"),
    ),
    # images
    Fault("an image that is missing", "2.png", image(None)),
    Fault("an image that is text", "not a readable image", image("hello")),
    Fault("an image of 3.6 billion pixels in 100 bytes", "exceeds limit", image(bomb())),
    Fault(
        "an image in a language that needs an interpreter (EPS)",
        "not a readable image",
        image("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 60\n%%EndComments\n"),
    ),
    Fault("an image 450 times as high as wide", "aspect ratio", thin),
    Fault("images that are torn in the middle of the run", ".png", during=images_cut, leaves=SAVED),
    Fault(
        'the same with bad_images = "skip"',
        "",
        during=images_cut,
        flags=("--bad_images", "skip"),
        code=0,
        leaves=FINISHED,
    ),
    # the run's folder
    Fault(
        "a folder that can't be written",
        "can't be used as a run folder",
        flags=("--run_dir", UNDER),
    ),
    Fault(
        "a file where the folder should be",
        "can't be used as a run folder",
        a_file_in_the_way,
        flags=("--run_dir", "{folder}/file/run"),
    ),
    Fault(
        "a run of another config",
        "different values of beta (was 0.04, now 0.5)",
        flags=("--beta", "0.5"),
    ),
    Fault(
        "a checkpoint with one bit changed (passed over for the one before)",
        "",
        checkpoint(2, "model.safetensors", flip),
        code=0,
        leaves=FINISHED,
    ),
    Fault(
        "a checkpoint with a file missing (the same)",
        "",
        checkpoint(2, "optimizer.safetensors", Path.unlink),
        code=0,
        leaves=FINISHED,
    ),
    Fault("every checkpoint damaged", "every checkpoint is damaged", all_checkpoints_flipped),
    Fault(
        "the run's config.toml torn",
        "the config of this run can't be read",
        lambda f: (f / "run" / "config.toml").write_text("model = ["),
    ),
    Fault(
        "the last line of metrics.jsonl torn (made whole)",
        "",
        lambda f: os.truncate(
            f / "run" / "metrics.jsonl", (f / "run" / "metrics.jsonl").stat().st_size - 30
        ),
        code=0,
        leaves=FINISHED,
    ),
    Fault(
        "a disk that is full when a checkpoint is saved",
        "can't save the checkpoint",
        during=limited_files(60_000),
        leaves=STEP_2,
    ),
    Fault(
        "a disk that is full when a step is recorded",
        "run: File too large",
        during=limited_files(2_000),
        leaves=STEP_2,
    ),
    Fault(
        "the checkpoints' folder gone in the middle of the run",
        "can't save the checkpoint",
        during=moved_away,
        leaves=ELSEWHERE,
    ),
    Fault(
        "a file where the finished model should go",
        "File exists",
        lambda f: (f / "run" / "model").write_text("in the way"),
        leaves=SAVED,
    ),
    # signals, numbers, memory, time
    Fault(
        "Ctrl-C",
        "stopped; the same command resumes from",
        during=press(signal.SIGINT),
        code=130,
        leaves=STEP_2,
    ),
    Fault(
        "SIGHUP, of a terminal that is closed",
        "stopped; the same command resumes from",
        during=press(signal.SIGHUP),
        code=129,
        leaves=STEP_2,
    ),
    Fault(
        "SIGTERM",
        "stopped; the same command resumes from",
        during=press(signal.SIGTERM),
        code=143,
        leaves=STEP_2,
    ),
    Fault(
        "a GPU out of memory where nothing can be halved",
        "out of memory on the GPU",
        during=out_of_memory,
        leaves=STEP_2,
    ),
    Fault("a clock that is set back by an hour", "", during=clock_back, code=0, leaves=FINISHED),
)

TESTED_ELSEWHERE = (
    (
        "kill -9, at any moment, in a save too",
        "137",
        "(nothing)",
        "all but at most save_every steps; the rest ends with the same bytes",
        "test_soak.py::test_three_kills_at_random_moments_change_no_byte_of_a_runs_output",
    ),
    (
        "a second process on the same folder",
        2,
        "run: another process is using this run folder; wait for it or choose another --run_dir",
        UNCHANGED,
        "test_train.py::test_a_second_process_on_the_same_folder_is_refused_and_changes_nothing",
    ),
    (
        "a stop in the middle of a step",
        "130, 143",
        "stopped; the same command resumes from run/checkpoints/step-000002",
        "every finished step",
        "test_session.py::test_a_stop_within_a_step_loses_no_finished_step_and_changes_no_byte",
    ),
    (
        "a step whose loss or gradient is not finite",
        0,
        "step 1: loss or gradient is not finite: update skipped; details in "
        "run/incidents/step-000001",
        "the finished run, and the step to play again",
        "test_session.py::test_a_step_that_is_not_finite_changes_no_weight_and_can_be_replayed",
    ),
    (
        "max_bad_steps of them in a row",
        2,
        "run: loss or gradient was not finite in 2 consecutive steps; ...",
        SAVED,
        "test_session.py::test_too_many_steps_in_a_row_that_are_not_finite_end_the_run_with_a_line_and_a_checkpoint",
    ),
    (
        "a GPU that is full",
        0,
        "out of memory with micro_batch_tokens = 4096; continuing with 2048",
        "the finished run, its gradients the same",
        "test_session.py::test_a_gpu_that_is_full_gets_smaller_micro_batches_and_the_same_gradient",
    ),
    (
        "one group that is too much for a GPU",
        2,
        "out of memory with a single group in a micro-batch; ...",
        SAVED,
        "test_session.py::test_a_group_that_does_not_fit_alone_is_one_line_and_loses_nothing",
    ),
    (
        "a disk that fails while a checkpoint is saved in the background",
        2,
        "run/checkpoints/step-000002: can't save the checkpoint ...",
        "the checkpoint before",
        "test_session.py::test_a_background_save_that_fails_is_reported_and_keeps_the_previous_checkpoint",
    ),
    (
        "a finished run whose checkpoints were deleted",
        2,
        "run holds a finished run; choose another --run_dir or delete it",
        UNCHANGED,
        "test_train.py::test_a_finished_run_whose_checkpoints_were_deleted_is_not_overwritten",
    ),
    (
        "a hub id without network",
        2,
        "org/model: no such folder, and the hub can't be reached (...); try again, or use a "
        "folder (hf download org/model --local-dir FOLDER on another machine)",
        "no run",
        "test_hub.py::test_a_hub_out_of_reach_is_one_line_at_once",
    ),
    (
        "a hub that refuses, or has no such model",
        2,
        "org/model: ... (which of the two, and what to do)",
        "no run",
        "test_hub.py::test_a_refusal_by_the_hub_is_one_line_that_says_which",
    ),
    (
        "a hub that never answers",
        2,
        "given up after 10 seconds, as above",
        "no run",
        "test_hub.py::test_a_hub_that_does_not_answer_is_given_up",
    ),
    (
        "a download that breaks off",
        2,
        "org/model: the download failed (...); run the command again, ...",
        "what was fetched; the next call completes it",
        "test_hub.py::test_an_interrupted_download_is_completed_and_not_taken_for_whole",
    ),
    (
        "a disk that is full while downloading",
        2,
        "org/model: can't be stored in ... (...); free some space, or set HF_HOME",
        "what was fetched",
        "test_hub.py::test_a_full_disk_is_one_line",
    ),
    (
        "a pipe or a device in place of a file",
        2,
        "...: a pipe or a device, not a file: save its contents as a file",
        UNCHANGED,
        "test_hostile.py::test_a_pipe_is_not_waited_for",
    ),
    (
        "a text in an image that unpacks to gigabytes",
        2,
        "...: not a readable image (...): replace the file",
        UNCHANGED,
        "test_hostile.py::test_a_text_that_unpacks_to_much_more_is_refused",
    ),
    (
        "damaged question files, images, configs and completions, by the thousand (fuzzing)",
        2,
        "one printable line of bounded length",
        UNCHANGED,
        "test_hostile_fuzz.py::test_a_damaged_question_file_is_questions_or_one_line",
    ),
    (
        "a stop in the middle of a validation",
        143,
        "stopped; the same command resumes from run/checkpoints/step-000002",
        "every finished step; the validation is done on coming back",
        "test_resume.py::test_a_validation_that_was_stopped_is_done_when_the_run_is_resumed",
    ),
    (
        "checkpoints that are away (a disk that is not mounted)",
        2,
        "run has records of 3 steps but no checkpoint; restore run/checkpoints "
        "(is a disk not mounted?), or choose another --run_dir",
        UNCHANGED,
        "test_resume.py::test_records_are_not_overwritten_when_the_checkpoints_are_away",
    ),
    (
        "a terminal, or a reader of the log, that goes away",
        0,
        "(to nobody)",
        FINISHED,
        "test_resume.py::test_a_terminal_that_is_gone_does_not_end_the_run",
    ),
    (
        "weights that have become infinite or NaN",
        2,
        "run: the weights are no longer finite and were not saved: training has diverged; ...",
        "the last sound checkpoint",
        "test_session.py::test_weights_that_are_not_finite_are_not_saved",
    ),
    (
        "a run that is moved, with its model and questions",
        0,
        "(it goes on)",
        FINISHED,
        "test_session.py::test_a_run_moved_with_its_model_and_questions_resumes_unchanged",
    ),
    (
        "an image that is validated on and tested",
        2,
        "its image ... is validated on too, ...",
        UNCHANGED,
        "test_session.py::test_questions_to_validate_on_share_no_image_with_the_others",
    ),
)
"""Rows whose tests stand in other files: (what, exit code, what is said, what is left, test)."""

HEAD = """# What can go wrong, and what then happens

A run that something from outside spoils ends with one line on the terminal that names the thing and
the remedy, never with a traceback, and never at the price of a finished checkpoint. The same
command goes on from where it stopped. Exit codes: 0 done; 2 something must be mended, as the line
says; 130, 143 and 129 stopped by Ctrl-C, SIGTERM and SIGHUP.

Each row has a test. Those of test_faults.py are brought about on a run that has done 2 of its 6
steps and saved both, and the messages are those that were seen, with paths relative to where the
run lies; in the other rows, at the end, they are summaries.
"""

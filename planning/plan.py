"""The plan of a run, printed before anything is begun: what it reads, what memory and time it
takes, what it leaves.

Questions, prompts, tokenizer and config.json are read and checked as the run itself does it;
weights are not touched, and nothing is written (of a hub id, all but the weights is fetched into
the hub's cache). On a processor the peak is that of the whole process, on a GPU that of torch's
tensors.
"""

import resource
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch

from common.config import Config
from common.device import available_memory, use_device
from common.errors import InputError
from common.hub import model_folder, weight_files
from data import Question, load_vocabulary
from data.choice import prompt_encoder
from model import keep_freed_memory, read_config
from training.folder import resumable

from .footprint import SAVED, Rehearsal
from .meter import Meter, Phase
from .speed import Speed, speed_of
from .workload import Workload, read_workload

BESIDES = 40_000_000
"""Bytes that a processor's run takes beside tensors and what it holds when a model is made: code of
libraries that is loaded when it is called, threads, logs.
"""


def holes(tensors: int) -> int:
    """Bytes of holes that tensors of changing sizes leave in a processor's heap, of the products'
    workspaces and of their prepared kernels.

    This, and `BESIDES`, are fitted to the peaks of whole runs with 34 MB to 5 GB of tensors, of
    which they leave 11 % to either side at most.
    """
    return min(13 * tensors // 10, 280_000_000 + tensors // 25)


PHASES = {
    "test": ("test", "test, a token"),
    "rollout": ("rollout", "rollout, a token"),
    "reference": ("reference",),
    "update": ("update", "further update"),
    "saving": ("checkpoint",),
}
"""Columns of the table of memory -> the phases of the rehearsal that they sum up: the fuller
one.
"""


def print_plan(config: Config) -> None:
    """Print the plan of the run that `config` describes. InputError for whatever the run would
    refuse.
    """
    keep_freed_memory()
    if torch.cuda.is_available():
        use_device(config)
    workload, rehearsal, lines = _read(config)
    print("\n".join(lines), flush=True)
    base = resident_memory()  # with all that torch loads to make a model
    meter = rehearsal.run(workload.heaviest)
    print("", *_memory_lines(config, meter, base), sep="\n", flush=True)
    speed = speed_of(config.device, getattr(torch, config.dtype))
    print(
        "", *_time_lines(config, workload, meter, speed), *_disk_lines(config, rehearsal), sep="\n"
    )


def _read(config: Config) -> tuple[Workload, Rehearsal, list[str]]:
    """What is read and made before anything is computed, and what the plan says of it."""
    checkpoint, passed_over = resumable(config)
    folder = model_folder(config.model, weights=False)
    shape = read_config(folder)
    vocabulary = load_vocabulary(folder, shape)
    encoder = prompt_encoder(vocabulary, shape, config)
    workload = read_workload(config, encoder, vocabulary)
    rehearsal = Rehearsal(config, shape, encoder, vocabulary)
    parameters = sum(param.numel() for param in rehearsal.policy.parameters())
    begins = (
        f"would go on from {checkpoint}" if checkpoint else "would begin anew: no checkpoint there"
    )
    rows = {
        "model": f"Qwen2-VL of {parameters / 1e6:,.1f} M parameters, {config.model}{_weights(folder)}",
        "run": f"{config.method}, {config.dtype} on {config.device}; {config.run_dir} {begins}",
        **_question_rows(workload),
        **_step_rows(config, workload),
    }
    damages = (
        f"! {damaged} is damaged ({damage}) and would be passed over"
        for damaged, damage in passed_over.items()
    )
    return workload, rehearsal, [*(f"{name:<10} {text}" for name, text in rows.items()), *damages]


def _weights(folder: Path) -> str:
    try:
        weight_files(folder)
    except InputError:
        return "; the weights are not there yet"
    return ""


def _question_rows(workload: Workload) -> dict[str, str]:
    parts = {"train": workload.train, "validate": workload.validation, "test": workload.test}
    lengths = sorted(workload.sizes.values())
    images = [len(question.images) for question in workload.sizes]
    left_out = f"; {workload.left_out} left out as too long" if workload.left_out else ""
    return {
        **{name: _counts(questions) for name, questions in parts.items() if questions},
        "prompts": f"{lengths[0]} to {lengths[-1]} tokens, {median(lengths):.0f} in the median; {sum(images):,} images"
        f", at most {max(images)} to a prompt{left_out}",
    }


def _counts(questions: Sequence[Question]) -> str:
    counts = Counter(question.modality for question in questions)
    return f"{len(questions):,} questions: " + ", ".join(
        f"{name} {count:,}" for name, count in counts.items()
    )


def _step_rows(config: Config, workload: Workload) -> dict[str, str]:
    epochs = config.steps * config.prompts_per_step / len(workload.train)
    low, high = min(workload.parts), max(workload.parts)
    micro_batches = f"{low}" if low == high else f"{low} to {high}"
    load = workload.heaviest
    return {
        "steps": f"{config.steps:,} of {config.prompts_per_step} questions, {load.group_size} completions of at most "
        f"{load.completion} tokens to each: {epochs:.2f} epochs",
        "": f"{micro_batches} micro-batches to an update, updates to a step: {config.inner_updates}",
    }


def _memory_lines(config: Config, meter: Meter, base: int) -> Iterator[str]:
    """The table of memory by purpose and phase, and the peaks."""
    columns = {
        name: max((meter.phases[phase] for phase in phases if phase in meter.phases), key=_held)
        for name, phases in PHASES.items()
        if phases[0] in meter.phases
    }
    gpu = config.device.startswith("cuda")
    sums = {name: _held(phase) for name, phase in columns.items()}
    fullest, peak = max(sums.items(), key=lambda item: item[1])
    unit, digits = ("GB", 1) if peak > 10e9 else ("MB", 0)

    def amounts(sizes: Iterable[int]) -> str:
        return "".join(f"{_amount(size, unit, digits):>11}" for size in sizes)

    yield f"{'memory, ' + unit:<18}" + "".join(f"{name:>11}" for name in columns)
    for purpose in dict.fromkeys(purpose for phase in columns.values() for purpose in phase.here):
        yield f"{purpose:<18}" + amounts(phase.here[purpose] for phase in columns.values())
    yield f"{'tensors in all':<18}" + amounts(sums.values())
    if gpu:
        yield from _gpu_lines(config, columns, peak, fullest)
        return
    taken = {name: held + holes(held) for name, held in sums.items()}
    taken["saving"] -= holes(sums["saving"]) // 2  # the copy that is saved lies in some of them
    process = base + BESIDES + max(taken.values())
    yield f"the process at its peak: {_size(process)}, with libraries and the holes between tensors"
    if config.save_every < config.steps and "update" in columns:
        copy = columns["saving"].here[SAVED]
        yield f"  and up to {_size(copy)} more where writing a checkpoint lasts into the next update"
    yield from _warning("memory", process, available_memory(), "this machine has")


def _gpu_lines(config: Config, columns: dict[str, Phase], peak: int, fullest: str) -> Iterator[str]:
    yield f"the GPU at its peak ({fullest}): {_size(peak)}, and about 1 GB for CUDA and its libraries"
    if torch.cuda.is_available():
        yield from _warning(
            "GPU memory",
            peak + 1_000_000_000,
            torch.cuda.mem_get_info(config.device)[0],
            "free are",
        )
    host = max((phase.elsewhere for phase in columns.values()), key=Counter.total)
    needed = (
        host.total() - host[SAVED]
    )  # without room for the copy, training waits while a checkpoint is written
    parts = ", ".join(f"{purpose} {_size(size)}" for purpose, size in host.items() if size)
    yield f"the host's memory: {_size(host.total())} ({parts}), beside some GB for the process itself"
    yield from _warning("host memory", needed, available_memory(), "this machine has")
    if needed <= available_memory() < needed + 2 * host[SAVED]:
        yield "  no room for the copy here: training will wait while a checkpoint is written"


def _warning(what: str, needed: int, there: int, says: str) -> Iterator[str]:
    if needed > there > 0:
        yield f"! not enough {what}: {says} {_size(there)}, {_size(needed)} are needed"


def _amount(size: int, unit: str, digits: int) -> str:
    return f"{size / {'GB': 1e9, 'MB': 1e6}[unit]:,.{digits}f}" if size else "-"


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def _held(phase: Phase) -> int:
    return phase.here.total()


def _time_lines(config: Config, workload: Workload, meter: Meter, speed: Speed) -> Iterator[str]:
    """Seconds of a step and hours of the run, if all completions are as long as they may be."""
    seconds = {name: speed.seconds(phase.work) for name, phase in meter.phases.items()}
    shares, tokens = {}, config.max_new_tokens - 1
    passes = workload.passes / config.steps  # of the heaviest micro-batch, in a step
    if "rollout" in seconds:
        shares["rollout"] = seconds["rollout"] + tokens * seconds["rollout, a token"]
    if "reference" in seconds:
        shares["reference"] = passes * seconds["reference"]
    shares["update"] = passes * seconds["update"] * config.inner_updates
    step = sum(shares.values())
    asked = 2 * len(workload.test) + config.steps // config.validate_every * len(
        workload.validation
    )
    batches = asked / max(1, len(workload.heaviest.tested))
    tests = batches * (seconds.get("test", 0) + tokens * seconds.get("test, a token", 0))
    parts = ", ".join(f"{name} {_seconds(share)}" for name, share in shares.items())
    yield f"time       a step takes about {_seconds(step)} if all completions are as long as they may be: {parts}"
    yield f"           {config.steps:,} steps {_hours(config.steps * step)}, measuring accuracy {_hours(tests)}"
    yield f"           {speed.source}: {speed.flops / 1e12:,.2f} TFLOP/s, {speed.read / 1e9:,.0f} GB/s from memory"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.{0 if seconds >= 100 else 1 if seconds >= 1 else 2}f} s"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.1f} min"


def _disk_lines(config: Config, rehearsal: Rehearsal) -> Iterator[str]:
    """What the run leaves at most: the checkpoints that are kept, the best, one being written, and
    the model.
    """
    saved = sum(tensor.nbytes for tensor in rehearsal.saved())
    weights = sum(param.nbytes for param in rehearsal.policy.parameters())
    written = -(-config.steps // config.save_every)
    validated = bool(config.validation_questions or config.validation_fraction)
    kept = min(config.keep_checkpoints + 1, written) + validated
    needed = kept * saved + weights
    yield f"disk       a checkpoint {_size(saved)}, at most {kept} at once; with the model {_size(needed)}"
    run_dir = Path(config.run_dir).absolute()
    folder = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    yield from _warning("disk", needed, shutil.disk_usage(folder).free, f"free in {folder} are")


def resident_memory() -> int:
    """Bytes of memory that this process has now, or has had at most where that can't be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""Prints the plan of a run: its data, memory, time and disk space.

Questions, prompts, tokenizer and config.json are read and checked exactly as in the run itself.
Weights are not read, and nothing is written (except that for a hub id, all files but the weights
are downloaded into the hub's cache). On a CPU, the peak is that of the whole process; on a GPU, it
is that of torch's tensors.
"""

import resource
from collections import Counter
from math import ceil
from pathlib import Path
from statistics import median

import torch

from common.config import Config
from common.device import available_memory, use_device
from common.hub import model_folder
from data import load_vocabulary
from data.choice import prompt_encoder
from model import keep_freed_memory, read_config
from training.folder import resumable
from training.saving import checkpoints_at_once, warn_of_a_small_disk

from .footprint import SAVED, Rehearsal
from .meter import MEASURED, Phase
from .speed import speed_of
from .workload import Workload

# Memory of a CPU run, in bytes, in addition to tensors and to the process at the time the model is
# made: libraries that are loaded later, threads, logs.
OVERHEAD = 40_000_000


def fragmentation(tensors: int) -> int:
    """Bytes lost to heap fragmentation and to workspaces of matrix products, in a CPU run.

    This formula and `OVERHEAD` are fitted to the peaks of complete runs with 34 MB to 5 GB of
    tensors; the largest error is 11%.
    """
    return min(13 * tensors // 10, 280_000_000 + tensors // 25)


def print_plan(config: Config) -> None:
    """Print the plan of the run that `config` describes. InputError if the run would refuse it."""
    keep_freed_memory()
    if torch.cuda.is_available():
        use_device(config)
    checkpoint, damages = resumable(config)
    folder = model_folder(config.model, weights=False)
    shape = read_config(folder)
    vocabulary = load_vocabulary(folder, shape)
    encoder = prompt_encoder(vocabulary, shape, config)
    load = Workload(config, encoder, vocabulary)
    rehearsal = Rehearsal(config, shape, encoder, load)

    millions = sum(param.numel() for param in rehearsal.policy.parameters()) / 1e6
    missing = "" if any(folder.glob("*.safetensors")) else "; its weights are not downloaded yet"
    print(f"model      {millions:,.1f} M parameters, {config.model}{missing}")
    start = f"resume from {checkpoint}" if checkpoint else "start from scratch (no checkpoint)"
    print(f"run        {config.method}, {config.dtype} on {config.device}")
    print(f"           {config.run_dir} would {start}")
    for damaged, damage in damages.items():
        print(f"! {damaged} is damaged ({damage}) and would be skipped")
    _print_questions(config, load)
    base = resident_memory()  # includes everything that torch loads to make a model
    speed = speed_of(config.device, getattr(torch, config.dtype))
    phases = rehearsal.run(speed)
    _print_memory(phases)
    held = {name: phase.memory.total() for name, phase in phases.items()}
    if rehearsal.gpu:
        _print_gpu(config, held, phases["host"].memory[SAVED])
    else:
        tests = phases["test"].memory[MEASURED] if load.tested else 0
        _print_process(base, held, tests)
    _print_time(config, load, phases)
    print(f"           {speed.source}")
    _print_disk(config, rehearsal)


def _print_questions(config: Config, load: Workload) -> None:
    for use, questions in load.questions.items():
        counts = Counter(question.modality for question in questions)
        modalities = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        if questions:
            print(f"{use:<10} {len(questions):,} questions: {modalities}")
    lengths, images = sorted(load.prompts.values()), [len(one.images) for one in load.prompts]
    print(f"prompts    {lengths[0]} to {lengths[-1]} tokens, median {median(lengths):.0f}")
    print(f"           {sum(images):,} images, at most {max(images)} per prompt")
    if load.left_out:
        print(f"           {load.left_out} questions are skipped because they are too long")
    steps = config.steps
    epochs = steps * config.questions_per_step / len(load.questions["train"])
    micro_batches = ceil(config.prompts_per_step / load.micro_batch)
    print(f"steps      {steps:,}, {epochs:.2f} epochs, {micro_batches} micro-batches per update")


def _print_memory(phases: dict[str, Phase]) -> None:
    """Print a table of memory by purpose and phase."""
    memories = [phase.memory for phase in phases.values()]
    rows = {name: [memory[name] for memory in memories] for name in sum(memories, Counter())}
    rows["all tensors"] = [memory.total() for memory in memories]
    print("\nmemory, MB            " + "".join(f"{name:>11}" for name in phases))
    for name, sizes in rows.items():
        print(f"{name:<22}" + "".join(f"{size / 1e6:11,.0f}" for size in sizes))


def _print_process(base: int, held: dict[str, int], tests: int) -> None:
    needed = [tensors + fragmentation(tensors) for tensors in held.values()]
    needed[-1] -= fragmentation(held["saving"]) // 2  # the copy to save reuses freed blocks
    # About half of the memory freed by a batch of test questions can't be reused by a step.
    process = base + OVERHEAD + tests // 2 + max(needed)
    print(f"peak of the process: {_size(process)}, with libraries and heap fragmentation")
    _warn("memory", process, available_memory())


def _print_gpu(config: Config, held: dict[str, int], copy: int) -> None:
    host = held.pop("host")
    peak = max(held.values())
    print(f"peak of GPU memory: {_size(peak)}, plus about 1 GB for CUDA and its libraries")
    if torch.cuda.is_available():
        _warn("GPU memory", peak + 10**9, torch.cuda.mem_get_info(config.device)[0])
    print(f"peak of host memory: {_size(host)}, plus a few GB for the process itself")
    # Without enough memory for the copy, training waits while the checkpoint is written.
    _warn("host memory", host - copy, available_memory())


def _print_time(config: Config, load: Workload, phases: dict[str, Phase]) -> None:
    """Print the time of a step and of the run if every completion reaches the length limit."""
    tests = phases.pop("test").seconds / load.test_batch if load.tested else 0.0
    step = sum(phase.seconds for phase in phases.values())
    shares = [f"{name} {phase.seconds:.2g} s" for name, phase in phases.items() if phase.seconds]
    print(f"\ntime       {step:.2g} s per step if every completion reaches the length limit")
    print(f"           {', '.join(shares)}")
    validations = config.steps // config.validate_every
    answers = 2 * len(load.questions["test"]) + validations * len(load.questions["validate"])
    run, tests = (config.steps * step + answers * tests) / 60, answers * tests / 60
    print(f"           {run:,.0f} min for the run, {tests:,.0f} of them to measure accuracy")


def _print_disk(config: Config, rehearsal: Rehearsal) -> None:
    most = checkpoints_at_once(config)
    needed = most * rehearsal.saved + rehearsal.weights
    print(f"disk       {_size(rehearsal.saved)} per checkpoint, at most {most} at a time")
    print(f"           {_size(needed)} in total, with the trained model")
    warn_of_a_small_disk(config, rehearsal.saved, rehearsal.weights)


def _warn(kind: str, needed: int, free: int) -> None:
    if needed > free > 0:
        print(f"! not enough {kind}: {_size(needed)} needed, {_size(free)} available")


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def resident_memory() -> int:
    """Memory of this process in bytes: the current value, or the peak so far if it is unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

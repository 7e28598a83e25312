"""The plan of a run, printed before anything is begun: what it reads, what memory and time it
takes, what it leaves.

Questions, prompts, tokenizer and config.json are read and checked as the run itself does it;
weights are not touched, and nothing is written (of a hub id, all but the weights is fetched into
the hub's cache). On a processor the peak is that of the whole process, on a GPU that of torch's
tensors.
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

# Bytes that a processor's run takes beside tensors and what is held when a model is made: libraries
# that are loaded when they are called, threads, logs.
BESIDES = 40_000_000


def holes(tensors: int) -> int:
    """Bytes of holes that tensors of changing sizes leave in a processor's heap, of the products'
    workspaces and of their prepared kernels.

    This, and `BESIDES`, are fitted to the peaks of whole runs with 34 MB to 5 GB of tensors, of
    which they leave 11 % to either side at most.
    """
    return min(13 * tensors // 10, 280_000_000 + tensors // 25)


def print_plan(config: Config) -> None:
    """Print the plan of the run that `config` describes. InputError for whatever the run would
    refuse.
    """
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
    there = "" if any(folder.glob("*.safetensors")) else "; the weights are not there yet"
    print(f"model      {millions:,.1f} M parameters, {config.model}{there}")
    begins = f"go on from {checkpoint}" if checkpoint else "begin anew: no checkpoint there"
    print(f"run        {config.method}, {config.dtype} on {config.device}")
    print(f"           {config.run_dir} would {begins}")
    for damaged, damage in damages.items():
        print(f"! {damaged} is damaged ({damage}) and would be passed over")
    _print_questions(config, load)
    base = resident_memory()  # with all that torch loads to make a model
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
    print(f"prompts    {lengths[0]} to {lengths[-1]} tokens, {median(lengths):.0f} in the median")
    print(f"           {sum(images):,} images, at most {max(images)} to a prompt")
    if load.left_out:
        print(f"           {load.left_out} questions are left out as too long")
    steps, prompts = config.steps, config.prompts_per_step
    epochs = steps * prompts / len(load.questions["train"])
    micro_batches = ceil(prompts / load.micro_batch)
    print(f"steps      {steps:,}, {epochs:.2f} epochs, {micro_batches} micro-batches to an update")


def _print_memory(phases: dict[str, Phase]) -> None:
    """The table of memory by purpose and phase."""
    memories = [phase.memory for phase in phases.values()]
    rows = {name: [memory[name] for memory in memories] for name in sum(memories, Counter())}
    rows["tensors in all"] = [memory.total() for memory in memories]
    print("\nmemory, MB            " + "".join(f"{name:>11}" for name in phases))
    for name, sizes in rows.items():
        print(f"{name:<22}" + "".join(f"{size / 1e6:11,.0f}" for size in sizes))


def _print_process(base: int, held: dict[str, int], tests: int) -> None:
    needed = [tensors + holes(tensors) for tensors in held.values()]
    needed[-1] -= holes(held["saving"]) // 2  # the copy that is saved lies in some of them
    # Half of what a batch of tests has left in the heap has other sizes than a step needs.
    process = base + BESIDES + tests // 2 + max(needed)
    print(f"the process at its peak: {_size(process)}, with libraries and holes in its heap")
    _warn("memory", process, available_memory())


def _print_gpu(config: Config, held: dict[str, int], copy: int) -> None:
    host = held.pop("host")
    peak = max(held.values())
    print(f"the GPU at its peak: {_size(peak)}, and about 1 GB for CUDA and its libraries")
    if torch.cuda.is_available():
        _warn("GPU memory", peak + 10**9, torch.cuda.mem_get_info(config.device)[0])
    print(f"the host's memory: {_size(host)}, beside some GB for the process itself")
    # Where there is no room for the copy that is saved, training waits while it is written.
    _warn("host memory", host - copy, available_memory())


def _print_time(config: Config, load: Workload, phases: dict[str, Phase]) -> None:
    """Seconds of a step and minutes of the run, if all completions are as long as they may be."""
    tests = phases.pop("test").seconds / load.test_batch if load.tested else 0.0
    step = sum(phase.seconds for phase in phases.values())
    shares = [f"{name} {phase.seconds:.2g} s" for name, phase in phases.items() if phase.seconds]
    print(f"\ntime       a step {step:.2g} s if all completions are as long as they may be")
    print(f"           {', '.join(shares)}")
    validations = config.steps // config.validate_every
    answers = 2 * len(load.questions["test"]) + validations * len(load.questions["validate"])
    run, tests = (config.steps * step + answers * tests) / 60, answers * tests / 60
    print(f"           the run {run:,.0f} min, {tests:,.0f} of them to measure accuracy")


def _print_disk(config: Config, rehearsal: Rehearsal) -> None:
    most = checkpoints_at_once(config)
    needed = most * rehearsal.saved + rehearsal.weights
    print(f"disk       a checkpoint {_size(rehearsal.saved)}, at most {most} at once")
    print(f"           with the model {_size(needed)}")
    warn_of_a_small_disk(config, rehearsal.saved, rehearsal.weights)


def _warn(what: str, needed: int, free: int) -> None:
    if needed > free > 0:
        print(f"! not enough {what}: {_size(needed)} are needed, {_size(free)} are free")


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def resident_memory() -> int:
    """Bytes of memory that this process has now, or has had at most where that can't be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

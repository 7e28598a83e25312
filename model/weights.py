"""Checkpoints in and out: a folder in Hugging Face layout, strictly checked, one tensor in memory
at a time.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import InputError
from common.files import read_bytes
from common.hub import INDEX, weight_files

from .config import Qwen2VLConfig, config_json, read_config
from .qwen2vl import Qwen2VL

SHARD_BYTES = 5_000_000_000
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
"""What a model folder holds beside weights and config.json; carried over unchanged when a trained
model is saved.
"""


def read_companions(folder: Path) -> dict[str, bytes]:
    """config.json and the tokenizer's files of a checkpoint folder: what a trained model is saved
    with.
    """
    files = (folder / name for name in ("config.json", *COMPANIONS))
    return {file.name: read_bytes(file) for file in files if file.is_file()}


class Slot(NamedTuple):
    """Where a checkpoint tensor lives in our model: rows [start, stop) of a parameter; `shape` as
    in the checkpoint.
    """

    parameter: str
    start: int
    stop: int
    shape: tuple[int, ...]


def checkpoint_layout(config: Qwen2VLConfig) -> dict[str, Slot]:
    """Published tensor name (`model.*`, `visual.*`, `lm_head.weight`) -> Slot, for every tensor of
    the model.

    Fused parameters (`qkv`, `gate_up`) have one slot per published tensor; the patch embedding is a
    convolution there and a matrix here.
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Qwen2VL(config).named_parameters()}
    q, kv, mlp = (
        config.hidden_size,
        config.num_key_value_heads * config.head_dim,
        config.intermediate_size,
    )
    fused = {
        "qkv": (("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)),
        "gate_up": (("mlp.gate_proj", mlp), ("mlp.up_proj", mlp)),
    }
    layout = {}
    for name, shape in shapes.items():
        owner, _, kind = name.rpartition(".")
        stem, _, leaf = owner.rpartition(".")
        if name.startswith("layers.") and leaf in fused:
            start = 0
            for part, rows in fused[leaf]:
                layout[f"model.{stem}.{part}.{kind}"] = Slot(
                    name, start, start + rows, (rows, *shape[1:])
                )
                start += rows
        else:
            published = f"{_published_name(owner)}.{kind}"
            vision = config.vision
            if owner == "visual.patch_embed":
                shape = (
                    shape[0],
                    vision.in_channels,
                    vision.temporal_patch_size,
                    vision.patch_size,
                    vision.patch_size,
                )
            layout[published] = Slot(name, 0, shape[0], shape)
    return layout


_RENAMED = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "out": "self_attn.o_proj", "down": "mlp.down_proj",
}  # fmt: skip
_RENAMED_VISION = {
    "patch_embed": "patch_embed.proj",
    "merger_norm": "merger.ln_q", "merger_fc1": "merger.mlp.0", "merger_fc2": "merger.mlp.2",
    "qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
}  # fmt: skip


def _published_name(owner: str) -> str:
    stem, _, leaf = owner.rpartition(".")
    if owner.startswith("visual."):
        return f"{stem}.{_RENAMED_VISION.get(leaf, leaf)}"
    if owner.startswith("layers."):
        return f"model.{stem}.{_RENAMED[leaf]}"
    return {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}[owner]


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str = torch.float32
) -> Qwen2VL:
    """Load a checkpoint folder: config.json and one or several safetensors files, in any published
    naming.

    Raises InputError for a missing file, a torn one, and a missing, unexpected or misshapen tensor.
    Every tensor is read from disk straight into its place, so that memory holds one copy of the
    model and one tensor.
    """
    folder = Path(folder)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    config = read_config(folder)
    layout = checkpoint_layout(config)
    # Before memory is asked for: a config.json may claim any size, and only the files say that
    # there is so much.
    places = _tensor_files(folder, layout, config.tie_word_embeddings)
    written_head = places.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    with torch.device("meta"):
        model = Qwen2VL(config)
    model = model.to(dtype).to_empty(device=device)
    parameters = dict(model.named_parameters())
    for key, file in places.items():
        # Opened anew each time: whatever was read through one mapping stays resident until it is
        # closed.
        with _opened(file) as tensors:
            _read_tensor(file, key, tensors, layout[_canonical(key)], parameters)
    if written_head:  # some savers write the tied head out; then it must be the embedding, or config.json is wrong
        with _opened(written_head) as tensors:
            head = tensors.get_tensor("lm_head.weight").to(model.embed.weight)
        if not torch.equal(head, model.embed.weight):
            raise InputError(
                f"{written_head}: lm_head.weight is not the embedding, but config.json says it is tied"
            )
    model.companions = read_companions(folder)
    return model.requires_grad_(True)


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: not a whole safetensors file ({error}); copy or download it again"
        ) from None


def _tensor_files(folder: Path, layout: dict[str, Slot], tied: bool) -> dict[str, Path]:
    """The file of each tensor, by its name there, when the headers of all files hold what the
    layout asks for.
    """
    places, missing = {}, dict(layout)
    for file in weight_files(folder):
        with _opened(file) as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
        for key, shape in shapes.items():
            name = _canonical(key)
            places[key] = file
            if key == "lm_head.weight" and tied:
                continue
            if name not in layout:
                raise InputError(
                    f"{file}: unexpected tensor {key}; is config.json of the same model?"
                )
            if shape != layout[name].shape:
                asked = list(layout[name].shape)
                raise InputError(
                    f"{file}: {key} has shape {list(shape)}, but config.json asks for {asked}"
                )
            missing.pop(name, None)
    if missing:
        names = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(
            f"{folder}: {len(missing)} tensors are missing ({names}); copy or download the checkpoint again"
        )
    return places


@torch.no_grad()
def _read_tensor(
    file: Path, key: str, tensors: safe_open, slot: Slot, parameters: dict[str, Tensor]
) -> None:
    tensor = tensors.get_tensor(key)
    if (
        not tensor.is_floating_point() or tensor.element_size() < 2
    ):  # numbers of 8 bits or fewer mean nothing unscaled
        raise InputError(
            f"{file}: {key} is {tensor.dtype}; quantised checkpoints can't be trained, take the bf16 one"
        )
    rows = parameters[slot.parameter][slot.start : slot.stop]
    rows.copy_(tensor.reshape(rows.shape))


def _canonical(key: str) -> str:
    """transformers 5 nests both halves below `model.`; the published files do not."""
    if key.startswith("model.visual."):
        return key.removeprefix("model.")
    return (
        key.replace("model.language_model.", "model.", 1)
        if key.startswith("model.language_model.")
        else key
    )


@torch.no_grad()
def published_tensors(model: Qwen2VL) -> dict[str, Tensor]:
    """A copy of the weights as they are now, on the CPU, in the published naming."""
    parameters = dict(model.named_parameters())
    return {
        name: _published_tensor(parameters, slot)
        for name, slot in checkpoint_layout(model.config).items()
    }


@torch.no_grad()
def save_model(
    model: Qwen2VL, folder: str | Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a folder that `load_model` and transformers load: config, weights in the published
    naming, tokenizer files.

    Files appear under their names only when they are whole; config.json comes last. `weights` are
    `published_tensors` of some moment before; None takes the model's as they are, a file's worth at
    a time.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in model.companions.items():
        if name != "config.json":
            (folder / name).write_bytes(content)
    parameters = dict(model.named_parameters())
    shards = _shards(checkpoint_layout(model.config), next(model.parameters()).element_size())
    weight_map, total = {}, 0
    for number, names in enumerate(shards, start=1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {
            n: weights[n] if weights else _published_tensor(parameters, slot)
            for n, slot in names.items()
        }
        write_tensors(tensors, folder / f"{file}.partial")
        os.replace(folder / f"{file}.partial", folder / file)
        weight_map.update(dict.fromkeys(names, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    # What an earlier save left in the other form would be read in place of this one.
    (folder / ("model.safetensors" if len(shards) > 1 else INDEX)).unlink(missing_ok=True)
    written = model.companions.get("config.json")
    raw = json.loads(written) if written else config_json(model.config)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype
    for section in (raw.get("text_config"), raw.get("vision_config")):
        if section and "dtype" in section:
            section["dtype"] = dtype
    _write_json(folder / "config.json", raw)


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """A safetensors file. OSError if it can't be written, of whichever library."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: can't be written ({error})") from None


def _shards(layout: dict[str, Slot], element_size: int) -> list[dict[str, Slot]]:
    shards, size = [{}], 0
    for name, slot in layout.items():
        nbytes = torch.Size(slot.shape).numel() * element_size
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = slot
        size += nbytes
    return shards


def _published_tensor(parameters: dict[str, Tensor], slot: Slot) -> Tensor:
    return (
        parameters[slot.parameter][slot.start : slot.stop]
        .reshape(slot.shape)
        .to("cpu", copy=True)
        .contiguous()
    )


def _write_json(path: Path, value: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)

"""Checkpoints out: a folder in Hugging Face layout, which `load_model` and transformers load."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.hub import INDEX

from .config import config_json
from .qwen2vl import Qwen2VL
from .weights import published_views

SHARD_BYTES = 5_000_000_000


def published_tensors(model: Qwen2VL) -> dict[str, Tensor]:
    """A copy of the weights as they are now, on the CPU, in the published naming."""
    views = published_views(model.state_dict(), model.config)
    # A copy even where they lie on the CPU already: training goes on while it is written.
    return {name: view.to("cpu", copy=True) for name, view in views.items()}


def save_model(
    model: Qwen2VL,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a folder that `load_model` and transformers load: config, weights in the published
    naming, tokenizer files.

    Files appear under their names only when they are whole; config.json comes last.

    Args:
        weights: `published_tensors` of some moment before; None takes the model's as they are, a
            file's worth at a time.

    Raises:
        OSError: a file can't be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in model.companions.items():
        if name != "config.json":
            (folder / name).write_bytes(content)
    weights = weights or published_views(model.state_dict(), model.config)
    sizes = {name: tensor.to("meta") for name, tensor in weights.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: weights[name].cpu() for name in names}
        write_tensors(tensors, folder / f"{file}.partial")
        os.replace(folder / f"{file}.partial", folder / file)
    # What an earlier save left in the other form would be read in place of this one.
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / INDEX, index)
        (folder / "model.safetensors").unlink(missing_ok=True)
    else:
        (folder / INDEX).unlink(missing_ok=True)
    _write_json(folder / "config.json", _config(model))


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """A safetensors file. OSError if it can't be written, of whichever library."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: can't be written ({error})") from None


def _config(model: Qwen2VL) -> dict[str, Any]:
    """The config.json that the model was loaded with, or one of ours, with the dtype it has now."""
    written = model.companions.get("config.json")
    raw = json.loads(written) if written else config_json(model.config)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype  # transformers 5 and 4
    for section in ("text_config", "vision_config"):
        if "dtype" in (raw.get(section) or {}):
            raw[section]["dtype"] = dtype
    return raw


def _write_json(file: Path, value: dict[str, Any]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)

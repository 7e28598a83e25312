"""Write a model as a folder in Hugging Face layout, which `load_model` and transformers read."""

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
    """A copy of the current weights on the CPU, under their published names."""
    views = published_views(model.state_dict(), model.config)
    # A copy even if they are on the CPU already: training continues while they are written.
    return {name: view.to("cpu", copy=True) for name, view in views.items()}


def save_model(
    model: Qwen2VL,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the config, the weights under their published names, and the tokenizer files.

    A file gets its final name only when it is complete; config.json is written last.

    Args:
        weights: `published_tensors` of an earlier moment; None takes the current weights, one file
            at a time.

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
    # Delete the other form, which an earlier save may have left: it could be read instead.
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / INDEX, index)
        (folder / "model.safetensors").unlink(missing_ok=True)
    else:
        (folder / INDEX).unlink(missing_ok=True)
    _write_json(folder / "config.json", _config(model))


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file. Raises OSError if that fails, in this library or in the system."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: can't be written ({error})") from None


def _config(model: Qwen2VL) -> dict[str, Any]:
    """The config.json that the model was loaded with, or a new one, with the current dtype."""
    loaded = model.companions.get("config.json")
    raw = json.loads(loaded) if loaded else config_json(model.config)
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

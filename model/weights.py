"""Load a checkpoint folder in Hugging Face layout, strictly checked, one tensor at a time.

saving.py writes such folders.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import InputError
from common.files import read_bytes
from common.hub import weight_files

from .config import Qwen2VLConfig, read_config
from .qwen2vl import Qwen2VL

# The other files of a checkpoint folder, which a trained model is saved with, unchanged.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)

# Last part of our module's name -> names of the published modules whose tensors it stacks.
_TEXT = {
    "embed": "embed_tokens",
    "attention_norm": "input_layernorm",
    "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate_up": "mlp.gate_proj mlp.up_proj",
    "down": "mlp.down_proj",
}
_VISION = {
    "patch_embed": "patch_embed.proj",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "merger_norm": "merger.ln_q",
    "merger_fc1": "merger.mlp.0",
    "merger_fc2": "merger.mlp.2",
}

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def published_views(tensors: dict[str, Tensor], config: Qwen2VLConfig) -> dict[str, Tensor]:
    """Views of our tensors in the published shapes, by published name.

    Published names are `model.*`, `visual.*` and `lm_head.weight`.

    Args:
        tensors: the model's `state_dict`, or tensors of the same names and shapes (gradients).
    """
    vision = config.vision
    kv_rows = config.num_key_value_heads * config.head_dim
    views = {}
    for name, tensor in tensors.items():
        owner, _, kind = name.rpartition(".")  # kind: weight or bias
        stem, dot, leaf = owner.rpartition(".")
        if leaf == "patch_embed":  # published as a convolution, a matrix here
            patch = vision.temporal_patch_size, vision.patch_size, vision.patch_size
            tensor = tensor.unflatten(1, (vision.in_channels, *patch))
        table = _VISION if name.startswith("visual.") else _TEXT
        modules = table.get(leaf, leaf).split()
        sizes = [len(tensor) // len(modules)] * len(modules)
        if len(modules) == 3:
            sizes = [config.hidden_size, kv_rows, kv_rows]
        prefix = "" if name.startswith(("visual.", "lm_head.")) else "model."
        for module, view in zip(modules, tensor.split(sizes), strict=True):
            views[f"{prefix}{stem}{dot}{module}.{kind}"] = view
    return views


@torch.no_grad()
def load_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> Qwen2VL:
    """Load a checkpoint folder: config.json and one or more safetensors files, in any published
    naming.

    Every tensor is read from disk straight into the model, so memory holds one copy of the model
    and one tensor.

    Raises:
        InputError: a file is missing or truncated, or a tensor is missing, unexpected, quantised or
            of the wrong shape.
    """
    folder = Path(folder)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    config = read_config(folder)
    with torch.device("meta"):
        model = Qwen2VL(config).to(dtype)
    # Before any memory is allocated: config.json may claim any size, and the files must confirm it.
    places = _tensor_places(folder, model)
    written_head = places.pop(_HEAD, None) if config.tie_word_embeddings else None
    model = model.to_empty(device=device)
    views = published_views(model.state_dict(), config)
    for name, (file, key) in places.items():
        views[name].copy_(_read_tensor(file, key))
    if written_head:
        head = _read_tensor(*written_head).to(model.embed.weight)
        if not torch.equal(head, model.embed.weight):
            raise InputError(
                f"{written_head[0]}: lm_head.weight differs from the embedding, but config.json"
                " ties them; set tie_word_embeddings to false there"
            )
    model.companions = read_companions(folder)
    return model


def read_companions(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint folder besides the weights, which a trained model is saved with."""
    files = (folder / name for name in ("config.json", *COMPANIONS))
    return {file.name: read_bytes(file) for file in files if file.is_file()}


def _tensor_places(folder: Path, model: Qwen2VL) -> dict[str, tuple[Path, str]]:
    """The file and the key of every tensor, by published name. Reads only the files' headers.

    Raises:
        InputError: the files do not hold exactly the model's tensors.
    """
    views = published_views(model.state_dict(), model.config)
    expected = {name: list(view.shape) for name, view in views.items()}
    if model.lm_head is None:
        expected[_HEAD] = expected[_EMBEDDING]  # some programs save a tied head all the same
    places = {}
    for file in weight_files(folder):
        for key, shape in _shapes(file).items():
            name = _published_name(key)
            if shape != expected.get(name):
                wanted = expected.get(name, "no such tensor")
                raise InputError(
                    f"{file}: {key} has shape {shape}, but config.json asks for {wanted}"
                )
            places[name] = file, key
    missing = sorted(views.keys() - places.keys())
    if missing:
        names = ", ".join(missing[:3])
        raise InputError(
            f"{folder}: {len(missing)} tensors are missing ({names}); copy or download the"
            " checkpoint again"
        )
    return places


def _shapes(file: Path) -> dict[str, list[int]]:
    with _opened(file) as tensors:
        keys = tensors.keys()
        return {key: tensors.get_slice(key).get_shape() for key in keys}


def _published_name(key: str) -> str:
    """The published name of a key: transformers 5 puts both halves below `model.`."""
    key = key.replace("model.language_model.", "model.")
    return key.replace("model.visual.", "visual.")


def _read_tensor(file: Path, key: str) -> Tensor:
    # Open the file anew for each tensor: all that was read stays in memory until it is closed.
    with _opened(file) as tensors:
        tensor = tensors.get_tensor(key)
    # Values of 8 bits or fewer are meaningless without their scale.
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise InputError(
            f"{file}: {key} is {tensor.dtype}; quantised checkpoints can't be trained, use the"
            " bf16 one"
        )
    return tensor


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: not a whole safetensors file ({error}); copy or download it again"
        ) from None

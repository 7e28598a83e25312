"""The shape of a Qwen2-VL, read from its `config.json`.

Two layouts are in use: the flat one of the published checkpoints (text fields at the top level,
`rope_scaling: {"type": "mrope", "mrope_section": [...]}`) and the nested one that transformers 5
writes (`text_config`, `rope_parameters`). Both become the same `Qwen2VLConfig`. Fields that do not
affect the computation are ignored.
"""

import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from common.errors import InputError
from common.files import read_json
from common.hub import MODEL_ADVICE

# Field types with their bounds, several times the values of any published model.
Size = Annotated[int, range(1, 1_000_001)]
Layers = Annotated[int, range(1, 1_001)]
Few = Annotated[int, range(1, 101)]
TokenId = Annotated[int, range(1_000_001)]


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: a ViT over 14x14x2 patches, and a merger of 2x2 patches into one token."""

    depth: Layers
    embed_dim: Size
    num_heads: Size
    mlp_ratio: Few = 4
    in_channels: Few = 3
    patch_size: Few = 14
    spatial_merge_size: Few = 2
    temporal_patch_size: Few = 2

    @property
    def patch_values(self) -> int:
        """Values in one flattened patch, C x t x p x p (1176 in the published models)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    def __post_init__(self) -> None:
        _check_bounds(self, "vision_config.")
        # A head holds a row angle and a column angle per frequency, twice.
        if self.embed_dim % (4 * self.num_heads):
            raise InputError(
                f"vision_config.embed_dim {self.embed_dim} must be a multiple of"
                f" 4 x num_heads {self.num_heads}"
            )


@dataclass(frozen=True)
class Qwen2VLConfig:
    """The shapes of language model and vision tower, and the token ids that the model needs."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    vision: VisionConfig
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)
    tie_word_embeddings: bool = False
    image_token_id: TokenId = 151655
    video_token_id: TokenId = 151656
    vision_start_token_id: TokenId = 151652
    vision_end_token_id: TokenId = 151653

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def vision_token_ids(self) -> list[int]:
        """The tokens that stand for an image or a video, or mark its beginning or end."""
        marks = [self.vision_start_token_id, self.vision_end_token_id]
        return [self.image_token_id, self.video_token_id, *marks]

    def __post_init__(self) -> None:
        _check_bounds(self)
        heads = self.num_attention_heads
        kv_heads = self.num_key_value_heads
        if self.hidden_size % heads or heads % kv_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {heads},"
                f" and that a multiple of num_key_value_heads {kv_heads}"
            )
        section = self.mrope_section
        whole = all(type(bands) is int and bands >= 0 for bands in section)
        if len(section) != 3 or not whole or 2 * sum(section) != self.head_dim:
            raise InputError(
                f"mrope_section {list(section)} must be 3 whole numbers that add up to half the"
                f" head size {self.head_dim}"
            )


def _check_bounds(config: VisionConfig | Qwen2VLConfig, prefix: str = "") -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        for bounds in getattr(field.type, "__metadata__", ()):
            if type(value) is not int or value not in bounds:
                raise InputError(
                    f"{prefix}{field.name} is {value!r}; it must be a whole number from"
                    f" {bounds[0]} to {bounds[-1]}"
                )
        if field.type is float and not (isinstance(value, int | float) and 0 < value < 1e12):
            raise InputError(f"{field.name} is {value!r}; it must be a positive number")


def read_config(folder: str | Path) -> Qwen2VLConfig:
    """Read the `config.json` of a checkpoint folder.

    Raises:
        InputError: the file is missing, truncated, or not that of a Qwen2-VL.
    """
    path = Path(folder) / "config.json"
    if not os.path.exists(path):  # False, not an error, for a name that no file can have
        raise InputError(f"{path}: no such file; {MODEL_ADVICE}")
    raw = read_json(path, "copy or download it again")
    kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
    if kind != "qwen2_vl":
        raise InputError(f"{path}: model_type is {kind!r}; only 'qwen2_vl' can be loaded")
    try:
        return parse_config(raw)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def parse_config(raw: dict[str, Any]) -> Qwen2VLConfig:
    """Convert the JSON object of either layout. Raises an InputError that names the field."""
    text = _entry(raw, "text_config", {}) or raw
    vision = _entry(raw, "vision_config", {})
    rope = _entry(text, "rope_scaling", {}) | _entry(text, "rope_parameters", {})
    # A model that computes something else must not load unnoticed.
    for name, value, implemented in (
        ("use_sliding_window", text.get("use_sliding_window") or False, (False,)),
        ("rope scaling", rope.get("rope_type", rope.get("type", "mrope")), ("mrope", "default")),
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("vision_config.hidden_act", vision.get("hidden_act", "quick_gelu"), ("quick_gelu",)),
    ):
        if value not in implemented:
            raise InputError(f"{name} is {value!r}; only {implemented[0]!r} is implemented")

    # The default epsilon is that of transformers, not the value that Qwen published.
    values = {"rms_norm_eps": 1e-5} | text | rope
    values["num_key_value_heads"] = text.get("num_key_value_heads") or text.get(
        "num_attention_heads"
    )
    values["mrope_section"] = tuple(_entry(rope, "mrope_section", [16, 24, 24]))
    tied = raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    values["tie_word_embeddings"] = bool(tied)
    values["vision"] = _made(VisionConfig, vision)
    values |= {key: value for key, value in raw.items() if key.endswith("_token_id")}
    return _made(Qwen2VLConfig, values)


def _entry(raw: dict[str, Any], key: str, default: Any) -> Any:
    """The object or list under `key`, or the default if it is missing or null."""
    value = raw.get(key) or default
    if not isinstance(value, type(default)):
        raise InputError(f"{key} is {value!r}; it must have the form {default!r}")
    return value


def _made(kind: type, values: dict[str, Any]) -> Any:
    """A config of that kind, from those of the values that are its fields."""
    known = {}
    for field in fields(kind):
        if field.name in values or field.default is MISSING:  # None fails the checks
            known[field.name] = values.get(field.name)
    return kind(**known)


def config_json(config: Qwen2VLConfig) -> dict[str, Any]:
    """The flat JSON object of the published checkpoints, which transformers 4 and 5 both read."""
    raw = asdict(config)
    vision = raw.pop("vision") | {"model_type": "qwen2_vl", "hidden_act": "quick_gelu"}
    section = list(raw.pop("mrope_section"))
    return raw | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_act": "silu",
        "rope_scaling": {"type": "mrope", "mrope_section": section},
        "use_sliding_window": False,
        "bos_token_id": None,  # generation_config.json has the first and last token of a text
        "eos_token_id": None,
        "vision_config": vision | {"hidden_size": config.hidden_size},
    }

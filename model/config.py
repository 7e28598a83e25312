"""The shape of a Qwen2-VL, read from `config.json` in either layout that people have.

Two layouts are in use: the flat one of the published checkpoints (text fields at the top level,
`rope_scaling: {"type": "mrope", "mrope_section": [...]}`) and the nested one that transformers 5
writes (`text_config`, `rope_parameters`). Both are read into one `Qwen2VLConfig`; fields that do
not change the computation are ignored.
"""

import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json
from common.hub import MODEL_ADVICE


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: a ViT over 14x14x2 patches, then a merger that turns 2x2 patches into one
    token.
    """

    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: int = 4
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened patch, C x t x p x p (1176 in the published models)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    def __post_init__(self) -> None:
        _check_sizes(self, "vision_config.")


@dataclass(frozen=True)
class Qwen2VLConfig:
    """The language model's shape, the vision tower's, and the token ids that the model itself must
    know.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vision: VisionConfig
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
        _check_sizes(self)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or heads % kv_heads:
            raise InputError(
                f"config: hidden_size {self.hidden_size}, num_attention_heads {heads} and num_key_value_heads"
                f" {kv_heads} must divide one another in turn"
            )
        section = self.mrope_section
        whole = all(type(bands) is int and bands >= 0 for bands in section)
        if len(section) != 3 or not whole or 2 * sum(section) != self.head_dim:
            raise InputError(
                f"config: mrope_section {list(section)} must be 3 whole numbers that sum to {self.head_dim / 2:g},"
                " half the head size"
            )
        if self.vision.embed_dim % (4 * self.vision.num_heads):
            raise InputError(
                f"config: vision_config.embed_dim {self.vision.embed_dim} must be a multiple of"
                f" 4 x num_heads {self.vision.num_heads}"
            )


_MOST = {"num_hidden_layers": 1_000, "depth": 1_000}
_MOST |= dict.fromkeys(
    ("mlp_ratio", "in_channels", "patch_size", "spatial_merge_size", "temporal_patch_size"), 100
)


def _check_sizes(config: VisionConfig | Qwen2VLConfig, prefix: str = "") -> None:
    """Sizes are 1 to 1,000,000 (layers: 1,000; a patch, ratios: 100), several times those of any
    published model.

    Token ids may be 0.
    """
    for field in fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        least, most = 0 if name.endswith("_token_id") else 1, _MOST.get(field.name, 1_000_000)
        if field.type is int and not (type(value) is int and least <= value <= most):
            raise InputError(
                f"config: {name} is {value!r}; it must be a whole number from {least} to {most}"
            )
        if field.type is float and not (isinstance(value, int | float) and 0 < value < 1e12):
            raise InputError(f"config: {name} is {value!r}; it must be a positive number")


def read_config(folder: str | Path) -> Qwen2VLConfig:
    """Read `config.json` of a checkpoint folder. Raises InputError if it is absent, torn, or not a
    Qwen2-VL.
    """
    path = Path(folder) / "config.json"
    if not os.path.exists(path):  # which is false, and no error, for a name that no file can have
        raise InputError(f"{path}: no such file; {MODEL_ADVICE}")
    raw = read_json(path, "copy or download it again")
    if not isinstance(raw, dict) or raw.get("model_type") != "qwen2_vl":
        found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise InputError(f"{path}: model_type is {found!r}; only 'qwen2_vl' can be loaded")
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], where: str = "config.json") -> Qwen2VLConfig:
    """Turn the JSON object of either layout into a Qwen2VLConfig; `where` names it in errors."""
    try:
        text, vision = _section(raw, "text_config") or raw, _section(raw, "vision_config")
        rope = {**_section(text, "rope_scaling"), **_section(text, "rope_parameters")}
        _refuse_variants(text, vision, rope)
        config = Qwen2VLConfig(
            **{key: text[key] for key in _TEXT_FIELDS},
            num_key_value_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
            rms_norm_eps=text.get("rms_norm_eps", 1e-5),
            rope_theta=rope.get("rope_theta", text.get("rope_theta", 1e6)),
            mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
            tie_word_embeddings=bool(
                raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")
            ),
            vision=VisionConfig(**_vision_fields(vision)),
            **{key: raw[key] for key in _TOKEN_FIELDS if key in raw},
        )
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('config: ')}") from None
    except (KeyError, TypeError) as error:
        name = f"field {error}" if isinstance(error, KeyError) else f"value ({error})"
        raise InputError(
            f"{where}: missing or malformed {name}; it must describe a Qwen2-VL"
        ) from None
    if vision.get("hidden_size", config.hidden_size) != config.hidden_size:
        found = vision["hidden_size"]
        raise InputError(
            f"{where}: vision_config.hidden_size is {found!r}, but hidden_size {config.hidden_size}"
        )
    return config


def _section(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict | None):
        raise InputError(f"config: {key} is a {type(value).__name__}; it must be a JSON object")
    return value or {}


def _refuse_variants(text: dict[str, Any], vision: dict[str, Any], rope: dict[str, Any]) -> None:
    """A model that computes something else must not load as if it were the same."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for field, value, known in (
        ("use_sliding_window", text.get("use_sliding_window"), (False, None)),
        ("the type of rope scaling", rope_type, ("default", "mrope")),
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("vision_config.hidden_act", vision.get("hidden_act", "quick_gelu"), ("quick_gelu",)),
    ):
        if value not in known:
            raise InputError(f"config: {field} is {value!r}; only {known[0]!r} is implemented")


def config_json(config: Qwen2VLConfig) -> dict[str, Any]:
    """The flat JSON object of the published checkpoints (read by transformers 4 and 5 alike)."""
    fields = asdict(config)
    vision, section, theta = (
        fields.pop("vision"),
        fields.pop("mrope_section"),
        fields.pop("rope_theta"),
    )
    in_channels = vision.pop("in_channels")
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **fields,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(section)},
        "use_sliding_window": False,
        "bos_token_id": None,  # which tokens begin and end a text stands in generation_config.json
        "eos_token_id": None,
        "vision_config": {
            "model_type": "qwen2_vl",
            **vision,
            "in_channels": in_channels,
            "hidden_size": config.hidden_size,
            "hidden_act": "quick_gelu",
        },
    }


_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_TOKEN_FIELDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _vision_fields(vision: dict[str, Any]) -> dict[str, Any]:
    """What VisionConfig takes; a field without a default that is absent raises KeyError, which
    names it.
    """
    needed = [
        field.name
        for field in fields(VisionConfig)
        if field.name in vision or field.default is MISSING
    ]
    return {name: vision[name] for name in needed}

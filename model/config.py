"""The shape of a Qwen2-VL, read from `config.json` in either layout that people have.

Two layouts are in use: the flat one of the published checkpoints (text fields at the top level, `rope_scaling:
{"type": "mrope", "mrope_section": [...]}`) and the nested one that transformers 5 writes (`text_config`,
`rope_parameters`). Both are read into one `Qwen2VLConfig`; fields that do not change the computation are ignored.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: a ViT over 14x14x2 patches, then a merger that turns 2x2 patches into one token."""

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


@dataclass(frozen=True)
class Qwen2VLConfig:
    """The language model's shape, the vision tower's, and the token ids that the model itself must know."""

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
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or heads % kv_heads:
            raise InputError(
                f"config: hidden_size {self.hidden_size}, num_attention_heads {heads} and num_key_value_heads {kv_heads}"
                " must divide one another in turn"
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise InputError(
                f"config: mrope_section {list(self.mrope_section)} must sum to half the head size {self.head_dim}"
            )
        if self.vision.embed_dim % (4 * self.vision.num_heads):
            raise InputError(
                f"config: vision embed_dim {self.vision.embed_dim} must be a multiple of 4 x num_heads {self.vision.num_heads}"
            )


def read_config(folder: str | Path) -> Qwen2VLConfig:
    """Read `config.json` of a checkpoint folder. Raises InputError if it is absent, torn, or not a Qwen2-VL."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a model is a folder with config.json and *.safetensors") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); copy or download it again") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "qwen2_vl":
        found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise InputError(f"{path}: model_type is {found!r}; only 'qwen2_vl' can be loaded")
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], where: str = "config.json") -> Qwen2VLConfig:
    """Turn the JSON object of either layout into a Qwen2VLConfig; `where` names it in errors."""
    text = raw.get("text_config") or raw
    vision = raw.get("vision_config") or {}
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    refuse = {
        "use_sliding_window": (text.get("use_sliding_window"), "sliding windows are not implemented"),
        "rope type": (kind not in ("default", "mrope") and kind, "only M-RoPE without length scaling is implemented"),
        "hidden_act": (text.get("hidden_act", "silu") != "silu" and text["hidden_act"], "only 'silu' is implemented"),
        "vision_config.hidden_act": (
            vision.get("hidden_act", "quick_gelu") != "quick_gelu" and vision["hidden_act"],
            "only 'quick_gelu' is implemented",
        ),
    }
    for field, (value, why) in refuse.items():
        if value:
            raise InputError(f"{where}: {field} is {value!r}; {why}")
    try:
        tied = raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
        config = Qwen2VLConfig(
            **{key: int(text[key]) for key in _TEXT_FIELDS},
            num_key_value_heads=int(text.get("num_key_value_heads") or text["num_attention_heads"]),
            rms_norm_eps=float(text.get("rms_norm_eps", 1e-5)),
            rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
            mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
            tie_word_embeddings=bool(tied),
            vision=VisionConfig(**_vision_fields(vision)),
            **{key: int(raw[key]) for key in _TOKEN_FIELDS if key in raw},
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{where}: {str(error).removeprefix('config: ')}") from None
        name = f"field {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{where}: missing or malformed {name}; it must describe a Qwen2-VL") from None
    if vision.get("hidden_size", config.hidden_size) != config.hidden_size:
        raise InputError(f"{where}: vision_config.hidden_size is {vision['hidden_size']}, but hidden_size {config.hidden_size}")
    return config


def config_json(config: Qwen2VLConfig) -> dict[str, Any]:
    """The flat JSON object of the published checkpoints (read by transformers 4 and 5 alike)."""
    fields = asdict(config)
    vision, section, theta = fields.pop("vision"), fields.pop("mrope_section"), fields.pop("rope_theta")
    in_channels = vision.pop("in_channels")
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **fields,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(section)},
        "use_sliding_window": False,
        "vision_config": {
            "model_type": "qwen2_vl",
            **vision,
            "in_channels": in_channels,
            "hidden_size": config.hidden_size,
            "hidden_act": "quick_gelu",
        },
    }


_TEXT_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TOKEN_FIELDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _vision_fields(vision: dict[str, Any]) -> dict[str, int]:
    names = {
        "depth": "depth",
        "embed_dim": "embed_dim",
        "num_heads": "num_heads",
        "mlp_ratio": "mlp_ratio",
        "in_channels": "in_channels",
        "patch_size": "patch_size",
        "spatial_patch_size": "patch_size",
        "spatial_merge_size": "spatial_merge_size",
        "temporal_patch_size": "temporal_patch_size",
    }
    return {field: int(vision[key]) for key, field in names.items() if key in vision}

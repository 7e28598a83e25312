"""Configs and checkpoint files: valid ones load, invalid ones give one line, memory is bounded."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import flat_config, tiny_config, tiny_model, write_weights
from torch import Tensor

from common.errors import InputError
from common.hub import INDEX
from model import Qwen2VL, Qwen2VLConfig, VisionConfig, load_model, read_config, save_model
from model.config import config_json, parse_config
from model.weights import COMPANIONS, published_views

PUBLISHED_2B = """{
  "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id":
  151643, "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
  "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656, "hidden_act":
  "silu", "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
  "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2_vl",
  "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps":
  1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
  "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": true,
  "use_sliding_window": false, "vision_config": { "depth": 32, "embed_dim": 1280, "mlp_ratio": 4,
  "num_heads": 16, "in_chans": 3, "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2,
  "spatial_patch_size": 14, "temporal_patch_size": 2 }, "rope_scaling": {"type": "mrope",
  "mrope_section": [16, 24, 24]}, "vocab_size": 151936
}"""
TOWER = VisionConfig(depth=32, embed_dim=1280, num_heads=16)
CONFIG_2B = Qwen2VLConfig(151_936, 1536, 8960, 28, 12, 2, TOWER, tie_word_embeddings=True)
CONFIG_7B = Qwen2VLConfig(152_064, 3584, 18_944, 28, 28, 4, TOWER)
CONFIG_72B = Qwen2VLConfig(152_064, 8192, 29_568, 80, 64, 8, TOWER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in the published layout: flat config, one weight file."""
    save_model(tiny_model(tiny_config(tied=False)), tmp_path)
    return tmp_path


def test_the_published_2b_config_is_read_unchanged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(PUBLISHED_2B)
    assert read_config(tmp_path) == CONFIG_2B


@pytest.mark.parametrize(
    ("config", "count"),
    [(CONFIG_2B, 2_208_985_600), (CONFIG_7B, 8_291_375_616), (CONFIG_72B, 73_405_560_320)],
)
def test_the_published_shapes_have_the_published_parameter_counts(
    config: Qwen2VLConfig, count: int
) -> None:
    with torch.device("meta"):
        model = Qwen2VL(config)
    assert sum(p.numel() for p in model.parameters()) == count
    views = published_views(model.state_dict(), config)
    assert sum(view.numel() for view in views.values()) == count


def test_a_config_that_we_write_is_read_back_unchanged() -> None:
    assert parse_config(config_json(CONFIG_2B)) == CONFIG_2B
    assert parse_config(json.loads(json.dumps(config_json(tiny_config())))) == tiny_config()


@pytest.mark.parametrize(
    "value", [0, -2, 2.5, "64", None, True, [64], 10**30, float("nan")], ids=repr
)
@pytest.mark.parametrize(
    "field",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    + [
        f"vision_config.{name}"
        for name in ("depth", "embed_dim", "num_heads", "patch_size", "spatial_merge_size")
    ],
)
def test_an_invalid_size_is_one_line_that_names_it(tmp_path: Path, field: str, value: Any) -> None:
    file = write_config(tmp_path, changed(field, value))
    assert_refused(lambda: read_config(tmp_path), str(file), field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**6),
        ("vision_config.depth", 10**6),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", -1.0),
        ("rope_theta", 0),
        ("rope_theta", float("inf")),
        ("image_token_id", "x"),
        ("image_token_id", -1),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", -2),
        ("vision_config", "tower"),
        ("vision_config", []),
        ("rope_scaling", "mrope"),
        ("text_config", 7),
        ("hidden_act", "gelu"),
        ("vision_config.hidden_act", "relu"),
        ("use_sliding_window", True),
        ("rope_scaling.type", "yarn"),
        ("rope_scaling.mrope_section", [2, 3]),
        ("rope_scaling.mrope_section", [2, 3, 4]),
        ("rope_scaling.mrope_section", ["2", 3, 3]),
        ("rope_scaling.mrope_section", [-1, 6, 3]),
        ("rope_scaling.mrope_section", [2, 3.0, 3]),
        ("rope_scaling.mrope_section", 8),
    ],
)
def test_a_config_of_an_unsupported_model_is_refused(
    tmp_path: Path, field: str, value: Any
) -> None:
    file = write_config(tmp_path, changed(field, value))
    assert_refused(lambda: read_config(tmp_path), str(file))


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vision_config.depth"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    raw = flat_config(tiny_config())
    holder, leaf = find(raw, field)
    del holder[leaf]
    file = write_config(tmp_path, raw)
    assert_refused(lambda: read_config(tmp_path), str(file), leaf)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"model_type": "llama"}', "\xff", pytest.param("[" * 100_000, id="deep")],
)
def test_a_file_that_is_not_a_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert_refused(lambda: load_model(folder), str(folder / "config.json"))


def test_a_folder_without_config_or_weights_names_the_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert_refused(lambda: load_model(folder), str(folder / "model.safetensors"))
    (folder / "config.json").unlink()
    assert_refused(lambda: load_model(folder), str(folder / "config.json"))


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (
        lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"),
        "model.layers.1.self_attn.k_proj.bias",
    ),
    "missing-head": (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
    "unexpected": (
        lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.zeros(64)}),
        "model.layers.3.",
    ),
    "misshapen": (lambda t: t.update({"model.norm.weight": torch.zeros(63)}), "model.norm.weight"),
    "transposed": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 72)}),
        "mlp.up_proj",
    ),
    "integer": (
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
        "model.norm.weight",
    ),
}


@pytest.mark.parametrize(("fault", "name"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("shards", [1, 2], ids=["one-file", "index"])
def test_a_wrong_tensor_is_one_line_that_names_it(
    folder: Path, fault, name: str, shards: int
) -> None:
    tensors = load_file(folder / "model.safetensors")
    fault(tensors)
    (folder / "model.safetensors").unlink()
    write_weights(tensors, folder, shards)
    assert_refused(lambda: load_model(folder), str(folder), name)


@pytest.mark.parametrize(
    "keep", [0, 5, 300, -1], ids=["empty", "no-header", "half-a-header", "one-byte-short"]
)
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(lambda: load_model(folder), str(file))


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ("{", INDEX),
        ("[]", INDEX),
        ('{"metadata": {}}', INDEX),
        ('{"weight_map": []}', INDEX),
        ('{"weight_map": {"a": 5}}', INDEX),
        ('{"weight_map": {"a": ["x"]}}', INDEX),
        ('{"weight_map": {"a": "../model.safetensors"}}', INDEX),
        ('{"weight_map": {"a": "/etc/passwd"}}', INDEX),
        ('{"weight_map": {"a": ".."}}', ".."),
        ('{"weight_map": {}}', "tensors are missing"),
        ('{"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}', "gone.safetensors"),
    ],
)
def test_a_wrong_index_is_one_line_that_names_it(folder: Path, index: str, named: str) -> None:
    (folder / INDEX).write_text(index)
    assert_refused(lambda: load_model(folder), str(folder), named)


def test_a_tied_head_that_is_saved_all_the_same_is_no_error(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(tied=True))
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    write_weights(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path
    )
    assert_same_weights(load_model(tmp_path), model)


def test_a_separate_head_in_a_checkpoint_with_tied_embeddings_is_refused(tmp_path: Path) -> None:
    save_model(tiny_model(tiny_config(tied=True)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    write_weights(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path)
    assert_refused(lambda: load_model(tmp_path), "model.safetensors", "lm_head.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saving_and_loading_does_not_change_a_bit(
    tmp_path: Path, monkeypatch, dtype: torch.dtype, tied: bool
) -> None:
    model = tiny_model(tiny_config(tied=tied)).to(dtype)
    save_model(model, tmp_path / "one")
    monkeypatch.setattr("model.saving.SHARD_BYTES", 50_000)
    save_model(model, tmp_path / "several")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    for name in ("one", "several"):
        again = load_model(tmp_path / name, dtype=dtype)
        assert again.config == model.config
        assert_same_weights(again, model)
        assert not list((tmp_path / name).glob("*.partial"))


def test_a_folder_saved_again_holds_the_new_weights_whatever_their_number_of_files(
    tmp_path: Path, monkeypatch
) -> None:
    first, second, third = (tiny_model(seed=seed) for seed in range(3))
    save_model(first, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("model.saving.SHARD_BYTES", 50_000)
        save_model(second, tmp_path)
    assert_same_weights(load_model(tmp_path), second)
    assert not (
        tmp_path / "model.safetensors"
    ).exists()  # transformers would prefer it to the index
    save_model(third, tmp_path)
    assert_same_weights(load_model(tmp_path), third)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])  # transformers 4 and 5
def test_tokenizer_files_and_unknown_config_fields_are_saved_too_and_the_dtype_is_updated(
    folder: Path, key: str
) -> None:
    for name in COMPANIONS:
        (folder / name).write_text(f"contents of {name}")
    config = {**flat_config(tiny_config(tied=False)), "eos_token_id": 7}
    del config["torch_dtype"]
    (folder / "config.json").write_text(json.dumps({**config, key: "float32"}))
    saved = folder / "saved"
    save_model(load_model(folder, dtype="bfloat16"), saved)
    assert all((saved / name).read_text() == f"contents of {name}" for name in COMPANIONS)
    assert json.loads((saved / "config.json").read_text()) == {**config, key: "bfloat16"}


def test_loading_holds_one_copy_of_the_model_and_one_tensor(tmp_path: Path) -> None:
    """Peak memory of a new process: 190 MB, in tensors of 10 MB. A second copy would double it."""
    if not Path("/proc/self/status").exists():
        pytest.skip(
            "peak memory of a process is read from /proc"
        )  # getrusage would include the parent's peak
    config = Qwen2VLConfig(
        4096,
        640,
        3840,
        5,
        10,
        10,
        VisionConfig(1, 64, 2),
        mrope_section=(8, 12, 12),
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Qwen2VL(config)
    save_model(model.to_empty(device="cpu"), tmp_path / "large")
    save_model(tiny_model(), tmp_path / "small")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert 150e6 < size < 250e6
    script = (
        "import re, sys; from model import load_model\n"
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+) kB', status())[1]) * 1024\n"
        "load_model(sys.argv[1]); before = peak(); model = load_model(sys.argv[2])\n"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "small"), str(tmp_path / "large")]
    root = Path(__file__).parent.parent
    grown = int(
        subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    )
    assert 0.8 * size < grown < 1.3 * size


def assert_refused(action: Callable[[], Any], *named: str) -> None:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and all(name in message for name in named), message


def assert_same_weights(model: Qwen2VL, other: Qwen2VL) -> None:
    mine, others = dict(model.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)


def find(raw: dict[str, Any], field: str) -> tuple[dict[str, Any], str]:
    *sections, leaf = field.split(".")
    for section in sections:
        raw = raw[section]
    return raw, leaf


def changed(field: str, value: Any) -> dict[str, Any]:
    raw = flat_config(tiny_config())
    holder, leaf = find(raw, field)
    holder[leaf] = value
    return raw


def write_config(folder: Path, raw: dict[str, Any]) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(raw))
    return file

"""Our Qwen2-VL against transformers' on random checkpoints: logits, positions, decoding, files."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tiny_models import (
    FORBIDDEN,
    IMAGE,
    MIXED,
    Batch,
    flat_config,
    hf_model,
    make_batch,
    tiny_config,
    write_weights,
)
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from common.hub import INDEX
from model import Qwen2VL, Qwen2VLConfig, load_model, read_config, save_model
from model.cache import GroupCache
from model.rope import batch_positions

NEW_TOKENS = 32
SHAPES = {
    "1:1-tied": (4, 4, True),
    "4:2-untied": (4, 2, False),
    "6:1-tied": (6, 1, True),
    "6:1-untied": (6, 1, False),
}
BATCHES = {"text": MIXED[1:2], "one-image": MIXED[:1], "several-images": MIXED[2:3], "mixed": MIXED}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory) -> tuple[nn.Module, Qwen2VL]:
    """A random model from transformers, and ours, loaded from its saved files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = hf_model(tiny_config(*SHAPES[request.param]))
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
@torch.no_grad()
def test_logits_and_positions_equal_those_of_transformers(pair, prompts) -> None:
    theirs, ours = pair
    batch = make_batch(prompts)
    expected = theirs(**hf_inputs(batch)).logits
    logits = ours(batch.tokens, batch.patches, batch.grids, batch.lengths)
    assert (logits - expected)[batch.mask].abs().max() < 1e-4
    assert expected[batch.mask].std() > 0.5  # constant logits would prove nothing

    kinds = (batch.tokens == IMAGE).int()
    index, _ = theirs.model.get_rope_index(
        batch.tokens, kinds, batch.grids, attention_mask=batch.mask.long()
    )
    positions = batch_positions(batch.tokens, batch.lengths, batch.grids, ours.config)
    assert torch.equal(positions[:, batch.mask], index[:, batch.mask])


@torch.no_grad()
def test_greedy_continuations_equal_those_of_transformers(pair) -> None:
    theirs, ours = pair
    batch = make_batch(MIXED)
    expected = hf_greedy(theirs, batch)
    assert all(
        len(set(row.tolist())) > 3 for row in expected
    )  # no continuation repeats a single token
    assert torch.equal(greedy_by_cache(ours, batch), expected)
    assert torch.equal(greedy_by_forward(ours, batch), expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shards", [1, 3], ids=["one-file", "index"])
@pytest.mark.parametrize("keys", ["published", "transformers"])
@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_every_checkpoint_layout_loads_into_the_same_model(
    tmp_path: Path, layout, keys, shards, tied
) -> None:
    config = tiny_config(tied=tied)
    theirs = hf_model(config)
    names = {
        name: name if keys == "transformers" else published(name)
        for name, _ in theirs.named_parameters()
    }
    write_weights(
        {names[name]: p.detach().clone() for name, p in theirs.named_parameters()}, tmp_path, shards
    )
    theirs.config.save_pretrained(tmp_path)
    if layout == "flat":
        write_flat_config(tmp_path, config)
    assert read_config(tmp_path) == config
    assert_same_function(load_model(tmp_path), theirs)


def test_shards_written_by_transformers_load(tmp_path: Path) -> None:
    theirs = hf_model(tiny_config(tied=False))
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / INDEX).exists()
    assert_same_function(load_model(tmp_path), theirs)


@pytest.mark.parametrize(
    ("layout", "tied", "shard_bytes"),
    [
        ("flat", True, None),
        ("flat", False, 100_000),
        ("nested", True, 100_000),
        ("nested", False, None),
    ],
)
def test_a_saved_model_loads_in_transformers_without_a_warning_and_computes_the_same(
    tmp_path: Path, monkeypatch, layout, tied, shard_bytes
) -> None:
    config = tiny_config(tied=tied)
    source, saved = tmp_path / "source", tmp_path / "saved"
    hf_model(config).save_pretrained(source)
    if layout == "flat":
        write_flat_config(source, config)
    ours = load_model(source)
    train(ours)
    if shard_bytes:
        monkeypatch.setattr("model.saving.SHARD_BYTES", shard_bytes)
    save_model(ours, saved)
    assert (saved / INDEX).exists() == bool(shard_bytes)

    theirs = load_in_transformers(saved, torch.float32)
    batch = make_batch(MIXED)
    assert torch.equal(hf_greedy(theirs, batch), greedy_by_cache(ours, batch))


@pytest.mark.parametrize("layout", ["flat", "nested"])
@torch.no_grad()
def test_a_model_saved_in_bf16_is_the_same_bf16_model_in_transformers(
    tmp_path: Path, layout
) -> None:
    config = tiny_config(tied=False)
    source, saved = tmp_path / "source", tmp_path / "saved"
    hf_model(config).save_pretrained(source)
    if layout == "flat":
        write_flat_config(source, config)
    ours = load_model(source, dtype="bfloat16")
    save_model(ours, saved)
    theirs = load_in_transformers(saved, "auto")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    batch = make_batch(MIXED)
    expected = theirs.float()(**hf_inputs(batch)).logits
    logits = ours.float()(batch.tokens, batch.patches, batch.grids, batch.lengths)
    assert (logits - expected)[batch.mask].abs().max() < 1e-4


@torch.no_grad()
def test_bf16_logits_are_as_close_to_fp32_as_those_of_transformers(pair) -> None:
    theirs, ours = pair
    batch = make_batch(MIXED)
    inputs = (batch.tokens, batch.patches, batch.grids, batch.lengths)
    exact = ours(*inputs)[batch.mask]
    try:
        error = (ours.bfloat16()(*inputs).float()[batch.mask] - exact).abs()
        their_error = (
            theirs.bfloat16()(**hf_inputs(batch)).logits.float()[batch.mask] - exact
        ).abs()
    finally:
        ours.float(), theirs.float()
    assert error.max() < 0.4 and error.mean() < 0.05 and error.mean() < 1.2 * their_error.mean()


def hf_inputs(batch: Batch, left: bool = False) -> dict[str, Tensor | None]:
    """Arguments of transformers' forward; `left` pads on the left, as generate needs it."""
    tokens, mask = batch.tokens, batch.mask
    if left:
        order = torch.argsort(mask.int(), dim=1, stable=True)
        tokens, mask = tokens.gather(1, order), mask.gather(1, order)
    return {
        "input_ids": tokens,
        "attention_mask": mask.long(),
        "pixel_values": batch.patches,
        "image_grid_thw": batch.grids,
        "mm_token_type_ids": (tokens == IMAGE).int(),
    }


def hf_greedy(theirs: nn.Module, batch: Batch) -> Tensor:
    """(N, NEW_TOKENS) by transformers' own generate."""
    inputs = hf_inputs(batch, left=True)
    out = theirs.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        suppress_tokens=FORBIDDEN,
        pad_token_id=0,
    )
    return out[:, batch.tokens.shape[1] :]


@torch.no_grad()
def greedy_by_cache(ours: Qwen2VL, batch: Batch) -> Tensor:
    """(N, NEW_TOKENS) by prefill and decode."""
    positions = batch_positions(batch.tokens, batch.lengths, batch.grids, ours.config)
    cache = GroupCache(*batch.tokens.shape, 1, NEW_TOKENS, torch.float32, batch.tokens.device)
    hidden = ours.prefill(batch.tokens, positions, batch.lengths, batch.patches, batch.grids, cache)
    after, out = positions.amax(dim=(0, 2)) + 1, []
    for step in range(NEW_TOKENS):
        out.append(best_allowed(hidden @ ours.head_weight.T).view(-1, 1))
        hidden = ours.decode(out[-1][:, 0], after + step, cache, span=step + 1)
    return torch.cat(out, dim=1)


@torch.no_grad()
def greedy_by_forward(ours: Qwen2VL, batch: Batch) -> Tensor:
    """(N, NEW_TOKENS) by running the whole right-padded sequences again for every token."""
    lengths, rows = batch.lengths.clone(), torch.arange(len(batch.tokens))
    tokens = torch.cat((batch.tokens, batch.tokens.new_zeros(len(rows), NEW_TOKENS)), dim=1)
    for _ in range(NEW_TOKENS):
        logits = ours(tokens, batch.patches, batch.grids, lengths)
        tokens[rows, lengths] = best_allowed(logits[rows, lengths - 1])
        lengths += 1
    columns = batch.lengths[:, None] + torch.arange(NEW_TOKENS)
    return tokens.gather(1, columns)


def best_allowed(logits: Tensor) -> Tensor:
    """The most likely allowed id: a random model could choose an image token without an image."""
    return logits.index_fill(-1, torch.tensor(FORBIDDEN), float("-inf")).argmax(dim=-1)


@torch.no_grad()
def train(model: Qwen2VL) -> None:
    """Change every weight, as training does, so that saving the loaded files again is noticed."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def load_in_transformers(folder: Path, dtype: torch.dtype | str) -> nn.Module:
    """from_pretrained, failing on any warning and any missing, unexpected or mismatched weight."""
    with warnings_of_transformers() as records:
        theirs, info = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    assert not [record.getMessage() for record in records]
    assert not any(info.values()), info
    return theirs.eval()


class warnings_of_transformers(logging.Handler):
    """Context manager that collects all that transformers logs as a warning or worse."""

    def __enter__(self) -> list[logging.LogRecord]:
        self.records: list[logging.LogRecord] = []
        logging.getLogger("transformers").addHandler(self)
        return self.records

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.records.append(record)

    def __exit__(self, *_) -> None:
        logging.getLogger("transformers").removeHandler(self)


@torch.no_grad()
def assert_same_function(ours: Qwen2VL, theirs: nn.Module) -> None:
    batch = make_batch(MIXED)
    expected = theirs(**hf_inputs(batch)).logits
    assert (ours(batch.tokens, batch.patches, batch.grids, batch.lengths) - expected)[
        batch.mask
    ].abs().max() < 1e-4


def published(name: str) -> str:
    """transformers 5's parameter name -> the name in the published files."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_flat_config(folder: Path, config: Qwen2VLConfig) -> None:
    (folder / "config.json").write_text(json.dumps(flat_config(config)))

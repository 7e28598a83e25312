"""Checkpoint folders, configs and artefacts made to break or take over their readers."""

import json
import os
import shutil
import struct
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tiny_run import tiny_model, write_run

from common.config import config_toml, load_config
from common.errors import LONGEST_MESSAGE, InputError
from data import load_vocabulary
from data.choice import prompt_encoder
from evaluation import compare
from evaluation.report.curves import read_metrics
from grpo.optimizer import MasterAdamW
from model import load_model, save_model
from training.checkpoint import Progress, damage_of, load_progress
from training.saving import Checkpoints

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(tiny_model(), folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(base, tmp_path) -> Path:
    shutil.copytree(base, tmp_path / "model")
    return tmp_path / "model"


def loaded(folder):
    model = load_model(folder)
    vocabulary = load_vocabulary(folder, model.config)
    config = load_config(write_run(folder / "run"))
    return prompt_encoder(vocabulary, model.config, config)


def refused(call, *parts):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) <= LONGEST_MESSAGE
    assert all(part in message for part in parts), message


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_folder_is_valid_before_the_tests_below_damage_it(folder):
    image_pad = tiny_tokenizer().convert_tokens_to_ids("<|image_pad|>")
    assert loaded(folder).shape.image_token_id == image_pad


def test_code_that_lies_in_a_checkpoint_is_not_run(folder, tmp_path):
    body = f"open({str(tmp_path / 'run_by_us')!r}, 'w')\nclass Evil:\n    pass\n"
    (folder / "evil.py").write_text(body)
    mapped = {
        "AutoConfig": "evil.Evil",
        "AutoModel": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    change(folder / "config.json", auto_map=mapped)
    change(
        folder / "tokenizer_config.json",
        auto_map=mapped,
        tokenizer_class="Evil",
        trust_remote_code=True,
    )
    template = (
        "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "run_by_us") + "') }}"
    )
    (folder / "chat_template.jinja").write_text(template)
    refused(lambda: loaded(folder), "chat template can't be rendered or tokenised", "SecurityError")
    assert not (tmp_path / "run_by_us").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('\x1b[31m\n') }}",
        "{{ a.b.c }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include '/etc/passwd' %}",
        "{{ messages | nothing }}",
        5,
        {"other": "x"},
    ],
    ids=ascii,
)
def test_a_chat_template_that_fails_in_any_way_is_one_line(folder, template):
    (folder / "chat_template.jinja").unlink()
    change(folder / "tokenizer_config.json", chat_template=template)
    refused(
        lambda: loaded(folder),
        "chat template can't be rendered or tokenised",
        "use the template of Qwen2-VL",
    )


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", "null", DEEP, b"\xff\xfe"], ids=lambda text: ascii(text[:9])
)
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"]
)
def test_a_truncated_or_nonsensical_file_is_one_line(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: loaded(folder), str(folder))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_pipe_among_the_tokenizers_files_is_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(lambda: loaded(folder), name, "a pipe or a device")


@pytest.mark.parametrize(
    "changed",
    [
        {"merges": [["zz", "qq"]]},
        {"vocab": {"a": -1}},
        {"vocab": {"a": 2**32 - 1}},
        {"vocab": {}, "merges": []},
        {"vocab": []},
        {"type": "Evil"},
        {"unk_token": 5},
    ],
    ids=str,
)
def test_a_tokenizer_that_contradicts_itself_or_the_model_is_one_line(folder, changed):
    raw = json.loads((folder / "tokenizer.json").read_text())
    change(folder / "tokenizer.json", model=raw["model"] | changed)
    refused(lambda: loaded(folder))


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer_class": 5},
        {"tokenizer_class": "RagTokenizer"},
        {"tokenizer_class": "BertTokenizer"},
        {"added_tokens_decoder": [1]},
        {"extra_special_tokens": 5},
        {"model_max_length": "x"},
        {"eos_token": 5},
    ],
    ids=str,
)
def test_a_tokenizer_config_of_nonsense_is_one_line(folder, changed):
    change(folder / "tokenizer_config.json", **changed)
    refused(lambda: loaded(folder))


@pytest.mark.parametrize(
    "changed",
    [
        {"image_token_id": 900_000},
        {"video_token_id": 340},
        {"num_hidden_layers": 1000},
        {"vocab_size": 1_000_000},
        {"vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 10**6}},
        {"tie_word_embeddings": [5]},
        {"rope_theta": float("inf")},
        {"hidden_size": 10**400},
        {"text_config": [1]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_config_that_asks_for_the_impossible_is_one_line(folder, changed):
    change(folder / "config.json", **changed)
    refused(lambda: loaded(folder))


def header(text, data=b"", length=None):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


NORM = "model.norm.weight"
HEADERS = {
    "longer than the file": header(b"{}", length=10**8 - 1),
    "longer than any": header(b"{}", length=2**63),
    "deep": header(DEEP.encode()),
    "list": header(b"[]"),
    "beyond the end": header({NORM: {"dtype": "F32", "shape": [32], "data_offsets": [0, 10**18]}}),
    "negative": header(
        {NORM: {"dtype": "F32", "shape": [-32], "data_offsets": [0, 128]}}, bytes(128)
    ),
    "overflow": header(
        {NORM: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 128]}}, bytes(128)
    ),
    "unknown type": header(
        {NORM: {"dtype": "\x1b[2J", "shape": [32], "data_offsets": [0, 128]}}, bytes(128)
    ),
    "escapes": header(
        {"\x1b[2J": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}}, bytes(128)
    ),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_weights_with_a_hostile_header_are_one_line(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(lambda: load_model(folder), "model.safetensors")


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint16, torch.complex64], ids=str
)
def test_quantised_weights_are_refused(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {NORM: torch.zeros(32, dtype=dtype)}, folder / "model.safetensors")
    refused(lambda: load_model(folder), NORM, "quantised")


@pytest.mark.parametrize(
    "name", ["a" * 5000, "a\0", "\ud800", DEEP], ids=lambda name: ascii(name[:8])
)
def test_an_index_of_impossible_names_is_one_line(folder, name):
    index = name if name == DEEP else json.dumps({"weight_map": {"model.norm.weight": name}})
    (folder / "model.safetensors.index.json").write_text(index)
    refused(lambda: load_model(folder), str(folder))


# Configs and artefacts


@pytest.mark.parametrize(
    "text",
    [
        "a = " + DEEP,
        "beta = 1" + "0" * 400,
        "seed = 0x" + "f" * 5000,
        "seed = 9223372036854775808",
        'model = "a\\u0000b"',
        "beta = 1e999",
        "seed = " + "9" * 5000,
        "a" * 10_000 + " = 1",
        "steps = 1979-05-27",
        "\x00",
        "model.a = 3",
        "[model]",
        "test_questions = [[['a']]]",
        'image_dir = "\\u0000"',
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_a_hostile_config_is_one_line(tmp_path, text):
    lines = {"model": '"m"', "train_questions": '"q"', "run_dir": '"r"'}
    needed = "".join(
        f"{key} = {value}\n"
        for key, value in lines.items()
        if not text.startswith((key, "[" + key))
    )
    (tmp_path / "c.toml").write_text(text + "\n" + needed)
    refused(lambda: load_config(tmp_path / "c.toml"))


def test_every_config_that_is_read_can_be_written_and_read_again(tmp_path):
    file = write_run(tmp_path)
    config = replace(load_config(file), image_dir="a'\"\\\U0001f600")
    file.write_text(config_toml(config))
    assert load_config(file) == config
    tables = tomllib.loads(config_toml(config)).values()
    assert config.image_dir in [table.get("image_dir") for table in tables]
    for text in ("\udcff", "a\x7f", "a\nb", ""):  # as a shell may pass them
        refused(lambda text=text: replace(config, run_dir=text), "run_dir", "printable")


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        "{",
        "[]",
        "5",
        "null",
        '{"step": [1]}',
        '{"step": 1%s}' % ("0" * 400),
        "\0",
        '{"loss": 1}',
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_metrics_of_nonsense_are_one_line(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + line + "\n")
    refused(
        lambda: read_metrics(tmp_path / "metrics.jsonl"), "metrics.jsonl line 2", "correct the line"
    )


@pytest.mark.parametrize(
    "progress",
    [
        DEEP,
        "{",
        "[]",
        "5",
        "null",
        "{}",
        '{"step": -1, "seconds": 0, "tokens": 0}',
        '{"step": 1, "seconds": "x", "tokens": 0}',
    ],
    ids=lambda text: text[:20],
)
def test_progress_of_nonsense_is_one_line(tmp_path, progress):
    config, model = load_config(write_run(tmp_path)), tiny_model()
    optimizer = MasterAdamW(model, config)
    with ThreadPoolExecutor(1) as thread:
        saving = Checkpoints(config, thread)
        checkpoint = saving.save(model, optimizer, Progress(step=2, seconds=1.0, tokens=5))
    assert load_progress(checkpoint, optimizer).step == 2 and damage_of(checkpoint) == ""
    (checkpoint / "progress.json").write_text(progress)
    refused(lambda: load_progress(checkpoint, optimizer), "step-000002: incomplete checkpoint")
    (checkpoint / "manifest.json").write_text(progress)
    assert damage_of(checkpoint)


@pytest.mark.parametrize("terms", [DEEP, "[]", "5"], ids=lambda text: text[:12])
def test_a_contract_of_nonsense_is_one_line(tmp_path, terms):
    (tmp_path / "contract.json").write_text(terms)
    refused(
        lambda: compare.compare((tmp_path, tmp_path), ("grpo", "grpo")),
        "contract.json: not readable",
    )


@pytest.mark.parametrize(
    "terms", ["{}", '{"number of questions": "x"}', '{"number of questions": 1}']
)
def test_answers_that_do_not_match_the_contract_are_one_line(tmp_path, terms):
    (tmp_path / "contract.json").write_text(terms)
    compared = partial(compare.compare, (tmp_path, tmp_path), ("grpo", "grpo"))
    refused(compared, "predictions.jsonl: can't be read")
    (tmp_path / "predictions.jsonl").write_text("")
    refused(compared, "'grpo' has answered 0 of")
    row = {"model": "grpo", "probe": "plain", "id": "q", "place": 0, "contract": "", "digest": ""}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(row | {"modality": [1]}) + "\n")
    refused(compared, "predictions.jsonl line 1", "`ground_truth` is missing")

# Every target sets up what it needs, from a bare clone on, and does nothing twice.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/miniature.toml
SFT_CONFIG ?= $(CONFIG:.toml=_sft.toml)
BLIND_CONFIG ?= $(CONFIG:.toml=_blind.toml)
TRAIN = $(BIN)/$(if $(GPUS),torchrun --nproc-per-node $(GPUS) --shutdown-timeout 600,python)

.PHONY: help setup train sft blind eval study lesson bench test check questions base tensorboard clean

help:
	@echo "make train        GRPO on the miniature, a few minutes on 2 CPU cores (CONFIG=... for others, GPUS=... for several)"
	@echo "make sft          the baseline: supervised fine-tuning on the same questions (SFT_CONFIG=...)"
	@echo "make blind        the control: GRPO without its images (BLIND_CONFIG=...)"
	@echo "make eval         the table, audits and report of base, SFT and GRPO (trains SFT first if missing)"
	@echo "make study        all methods, three bases, several seeds: two to three hours; rewrites docs/study.md"
	@echo "make lesson       what each knob of GRPO does to the gradient: bias and noise beside the exact one, in a minute"
	@echo "make bench        a step's cost beside transformers and TRL (if installed); rewrites BENCHMARKS.md"
	@echo "make test         all tests, on two cores"
	@echo "make check        format, lint and types: ruff format, ruff check, mypy"
	@echo "make tensorboard  curves, completions and images of the runs"
	@echo "make base         train the miniature's base model from scratch (half an hour)"
	@echo "make clean        delete the environment and the generated questions, but no runs"

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $@

questions: setup
	$(BIN)/python -m miniature.questions --out build/miniature

train: questions
	$(TRAIN) train.py --config $(CONFIG)

sft: questions
	$(TRAIN) train.py --config $(SFT_CONFIG)

blind: questions
	$(TRAIN) train.py --config $(BLIND_CONFIG)

# A finished run is not trained further: this only measures it again, in seconds.
eval: sft
	$(BIN)/python evaluate.py --config $(CONFIG)

study: questions
	$(BIN)/python -m miniature.study

lesson: questions
	$(BIN)/python -m miniature.lesson

bench: setup
	$(BIN)/python -m benchmarks

test: questions
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

base: setup
	$(BIN)/python -m miniature.base --out miniature/base

tensorboard: setup
	$(BIN)/tensorboard --logdir runs

clean:
	rm -rf .venv build

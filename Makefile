# make quickstart    install, train a small GPT on the bundled text and let it write
# make test          install what tests need and run them all
# make lint          style, format and types

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
QUICKSTART := config_hub/pretrain/quickstart
OUT := out/quickstart
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: quickstart test lint clean

quickstart: .venv/quickstart.stamp
	@echo; echo "== 1/3  A tokenizer, trained on $(QUICKSTART)/text.txt"
	$(BIN)/litgpt train_tokenizer $(QUICKSTART)/text.txt --out_dir $(OUT)/tokenizer --vocab_size 2048 --overwrite
	@echo; echo "== 2/3  A small GPT, pretrained on the same text (a minute or two)"
	$(BIN)/litgpt pretrain --config $(QUICKSTART).yaml --overwrite
	@echo; echo "== 3/3  What it writes"
	$(BIN)/litgpt generate $(OUT)/final --prompt "Once" --max_new_tokens 100
	@echo; echo "Talk to it: $(BIN)/litgpt chat $(OUT)/final"

test: .venv/test.stamp
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile -q

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "== Making .venv"
	$(PYTHON) -m venv .venv

.venv/quickstart.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "== Installing LitGPT and what it needs into .venv (a few minutes the first time)"
	$(PIP) --editable '.[plot]'
	@touch $@

.venv/test.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "== Installing LitGPT, its extras and the test tools into .venv (a few minutes the first time)"
	$(PIP) --editable '.[all,test]'
	@touch $@ .venv/quickstart.stamp

clean:
	rm -rf .venv out/quickstart

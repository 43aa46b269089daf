# The two commands that matter: `make demo` and `make test`. Each sets up .venv by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= outputs

.DEFAULT_GOAL := help
.PHONY: help demo demo-all test lint types check parity docs clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/.installed  ## make a drawn figure dance (under a minute on a CPU)
	mkdir -p $(OUT)
	$(BIN)/python -m xicon_infer.run --pipeline scail --preset tiny \
		--image examples/tiny_character.png --track examples/tiny_dance.npz \
		--width 128 --height 224 --max-frames 97 --context-frames 49 --pose-end 1 --seed 1 \
		--sheet --pose-preview --overwrite --output $(OUT)/demo.mp4
	$(BIN)/python examples/demo_gif.py examples/tiny_character.png $(OUT)/demo.mp4 $(OUT)/demo.gif

demo-all: demo  ## the demo, and one short video of every other pipeline (a few minutes on a CPU)
	$(BIN)/python -m xicon_infer.run --pipeline steady_dancer --preset tiny \
		--image examples/character.png --track examples/dance_fullbody.npz \
		--width 192 --height 336 --max-frames 17 --condition-guide-scale 1 --seed 1 \
		--sheet --pose-preview --overwrite --output $(OUT)/steady_dancer.mp4
	$(BIN)/python -m xicon_infer.run --pipeline wan_i2v --preset tiny \
		--image examples/character.png --prompt "she waves" \
		--width 192 --height 336 --num-frames 17 --seed 1 \
		--sheet --overwrite --output $(OUT)/wan_i2v.mp4
	$(BIN)/python -m xicon_infer.run --pipeline wan_t2v --preset tiny \
		--prompt "a red fox in the snow" --width 336 --height 192 --num-frames 17 --seed 1 \
		--sheet --overwrite --output $(OUT)/wan_t2v.mp4
	$(BIN)/python -m xicon_infer.run --pipeline pose \
		--track examples/dance_fullbody.npz --width 256 --height 448 --max-frames 49 \
		--sheet --overwrite --output $(OUT)/pose.mp4

test: $(VENV)/.installed  ## run every test that needs no GPU, network or real weights
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4

lint: $(VENV)/.installed  ## format and lint check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed  ## mypy, strict
	$(BIN)/mypy

check: lint types test  ## everything a commit must pass

parity: $(VENV)/.installed  ## replay the golden files that travel with the tests
	$(BIN)/python -m tests.parity tests/golden

docs: $(VENV)/.installed  ## write the reference pages from the tables of options, fields and settings
	$(BIN)/python docs/reference_cli.py
	$(BIN)/python docs/reference_request.py
	$(BIN)/python docs/reference_environment.py

clean:  ## remove the virtual environment and outputs
	rm -rf $(VENV) $(OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis

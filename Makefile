# The five verbs on the bundled sample, and what keeps them right. `make` lists the targets.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   := cache/demo
AVRL   := AVRL_CACHE=$(DEMO) $(BIN)/avrl
# What a CPU can learn from the sample in some two minutes a model (facts and figures: tests/benchmarks/RESULTS.md).
TRAIN  := --size tiny --image-size 112 --pairs-per-episode 20 --batch-size 8 --lr 3e-4 --warmup-epochs 0.5 \
          --sample-decay 1 --loss-decay 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fix bench gpu crash golden clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

# The stamp is younger than what it was made from, or pip runs again.
$(VENV)/demo.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[imagenet]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[imagenet,dev]'
	touch $@

setup: $(VENV)/dev.stamp  ## virtual environment with everything that development needs

demo: $(VENV)/demo.stamp  ## the five verbs on the bundled sample, on a CPU, in minutes; again: all hits
	$(AVRL) fetch sample
	$(AVRL) prep sample
	$(AVRL) pretrain two-stream $(TRAIN) --epochs 5
	$(AVRL) pretrain single-stream $(TRAIN) --epochs 5
	$(AVRL) pretrain videomae $(TRAIN) --epochs 6
	$(AVRL) probe bridge --encoder two-stream --encoder single-stream --encoder videomae --encoder efficientnet-lite0
	$(AVRL) report

test: $(VENV)/dev.stamp  ## all quick tests
	$(BIN)/pytest -q

check: $(VENV)/dev.stamp  ## what CI runs: ruff, mypy --strict, pytest
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q

fix: $(VENV)/dev.stamp  ## format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

crash: $(VENV)/dev.stamp  ## kill every verb at random moments, many times; compare digests
	$(BIN)/pytest -q -m slow

bench: $(VENV)/dev.stamp  ## hot paths beside their ceilings and peers, as ratios
	$(BIN)/python -m tests.benchmarks.loader
	$(BIN)/python -m tests.benchmarks.decode
	$(BIN)/python -m tests.benchmarks.part
	$(BIN)/python -m tests.benchmarks.step
	$(BIN)/python -m tests.benchmarks.encode
	$(BIN)/python -m tests.benchmarks.report

gpu: $(VENV)/dev.stamp  ## on a machine with a GPU: its tests, then steps and utilisation by model and size
	$(BIN)/pytest -q -m gpu
	$(BIN)/python -m tests.benchmarks.gpu

golden: $(VENV)/dev.stamp  ## write the golden files again; the diff is the review
	$(BIN)/python tests/golden/regen.py

clean:  ## remove the demo's cache and the virtual environment
	rm -rf $(DEMO) $(VENV)

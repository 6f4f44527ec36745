# `make` lists the verbs. Everything runs in .venv, which the first verb that needs it makes.

PYTHON ?= python3.11
VENV   ?= .venv
DATA   ?= sample
CACHE  ?= teacher_cache
TEACHER ?= classical
CHECKPOINT ?=
OUT    ?= runs/default
PRESET ?= default
DEMO   ?= demo
ARGS   ?=

BIN := $(VENV)/bin
CLI := $(BIN)/samfeat-cli
READY := $(VENV)/.ready
SAMPLE_SIZE := --crop-size 160 --pairs-per-scene 10  # of the embedded sample; photographs have the command's defaults

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all teacher-cache inspect train evaluate check bench docs docs-check figure clean clean-cache

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(READY)  ## make .venv and install the project with its tools

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## the whole mission on the embedded sample, about ten minutes on two cores
	@echo "== 1/6 sample: scenes with exact geometry, and a real stereo pair"
	$(CLI) sample $(DEMO)/sample
	@echo "== 2/6 stage one: the teacher writes its targets into the cache"
	$(CLI) teacher-cache --data $(DEMO)/sample --cache $(DEMO)/cache --crop-size 160 --pairs-per-scene 16
	@echo "== 3/6 what the cache holds"
	$(CLI) inspect-cache $(DEMO)/cache --html $(DEMO)/gallery.html --verify
	@echo "== 4/6 stage two: the student learns from the cache"
	$(CLI) train --cache $(DEMO)/cache --out $(DEMO)/run --preset sample --resume auto
	@echo "== 5/6 evaluation on held-out sequences"
	$(CLI) evaluate hpatches --data $(DEMO)/sample/heldout --out $(DEMO)/evaluation --method sift
	$(CLI) evaluate hpatches --data $(DEMO)/sample/heldout --out $(DEMO)/evaluation --weights $(DEMO)/run/weights.safetensors
	$(CLI) evaluate hpatches --data $(DEMO)/sample/heldout --out $(DEMO)/evaluation --name shipped
	@echo "== 6/6 matches on a real image pair"
	$(CLI) match $(DEMO)/sample/Undistorted_SfM/0000/images/left.jpg $(DEMO)/sample/Undistorted_SfM/0000/images/right.jpg --weights $(DEMO)/run/weights.safetensors --out $(DEMO)/matches.png --maps $(DEMO)/maps.png
	@echo "== look at"
	@echo "$(DEMO)/gallery.html             what the teacher saw"
	@echo "$(DEMO)/run/report.html          how the student learned"
	@echo "$(DEMO)/evaluation/report.html   its accuracy and its matches beside SIFT's and those of the student that ships"
	@echo "$(DEMO)/matches.png              its matches on a real image pair"
	@echo "$(DEMO)/maps.png                 its keypoints, heat-map, attention and edges there"
	@echo "$(DEMO)/run/weights.safetensors  the student itself: SAMFeat.from_pretrained(...)"

test: $(READY)  ## run the tests, except those marked slow
	$(BIN)/pytest --numprocesses 2 --dist worksteal $(ARGS)

test-all: $(READY)  ## run every test: more kills, full-size SAM, compilation
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m "" $(ARGS)

sample: $(READY)
	$(CLI) sample sample

teacher-cache: $(READY) $(filter sample,$(DATA))  ## stage one: DATA=photos (else the small sample) TEACHER=classical|sam_vit_h CHECKPOINT=file CACHE=folder
	$(CLI) teacher-cache --data $(DATA) --cache $(CACHE) --teacher $(TEACHER) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) $(if $(filter sample,$(DATA)),$(SAMPLE_SIZE)) $(ARGS)

inspect: $(READY)  ## summary of CACHE, and a gallery beside it
	$(CLI) inspect-cache $(CACHE) --html $(CACHE)/gallery.html $(ARGS)

train: $(READY)  ## stage two: CACHE=folder OUT=runs/name PRESET=default|paper|released|sample
	$(CLI) train --cache $(CACHE) --out $(OUT) --preset $(PRESET) --resume auto $(ARGS)

evaluate: $(READY)  ## HPatches protocol: DATA=folder of sequences, the weights of OUT
	$(CLI) evaluate hpatches --data $(DATA) --weights $(OUT)/weights.safetensors $(ARGS)

check: $(READY)  ## formatting, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p .typing && ln -sfn $(CURDIR) .typing/samfeat
	MYPYPATH=.typing $(BIN)/mypy -p samfeat
	$(BIN)/lint-imports

bench: $(READY)  ## measurements, on one page: bench/report.html
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file; done
	$(CLI) benchmark speed
	$(BIN)/python tests/benchmarks/write_page.py

docs: $(READY)  ## the documentation as a site: build/site/index.html
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-check: $(READY)  ## run the documentation's code blocks on what the demo left in DEMO
	$(BIN)/python tests/run_docs.py --demo $(DEMO)

figure: $(READY)  ## the README's picture, from what the demo left in DEMO, and those of docs/gallery.md
	$(BIN)/python tests/benchmarks/draw_demo.py --demo $(DEMO)
	$(BIN)/python tests/benchmarks/draw_gallery.py

clean:  ## remove build products and tool caches; never a store
	rm -rf build dist .typing .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis samfeat.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

clean-cache:  ## remove the stores of CACHE, after asking
	@ls -d $(CACHE)/*.zarr && read -p "Remove these? [y/N] " answer && [ "$$answer" = y ] && rm -rf $(CACHE)/*.zarr

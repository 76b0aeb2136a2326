# Everything kvcalib does, from a fresh clone; `make` lists the targets.
#
# Nothing is written outside this folder: packages go to .venv, caches and temporary files to .cache, results to
# artifacts. To use models that are already on this machine: make calibrate HF_HOME=~/.cache/huggingface MODEL=...

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
RUNTIME := .venv/.installed-demo
DEV := .venv/.installed-dev

# The first of these that is new enough; `make PYTHON=/path/to/python demo` takes another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
# pip must be told the exact torch: asked for any, it may choose a build of several gigabytes.
TORCH := $(shell grep '^torch==' constraints.txt)
WORKERS ?= 2

export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TMPDIR := $(CURDIR)/.cache/tmp
export XDG_CACHE_HOME := $(CURDIR)/.cache
export XDG_CONFIG_HOME := $(CURDIR)/.cache/config
export HF_HOME := $(CURDIR)/.cache/huggingface
export TORCH_HOME := $(CURDIR)/.cache/torch
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export TRITON_CACHE_DIR := $(CURDIR)/.cache/triton
export CUDA_CACHE_PATH := $(CURDIR)/.cache/cuda
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export HYPOTHESIS_STORAGE_DIRECTORY := $(CURDIR)/.cache/hypothesis
export MYPY_CACHE_DIR := $(CURDIR)/.cache/mypy
export RUFF_CACHE_DIR := $(CURDIR)/.cache/ruff
# numba keeps compiled code in __pycache__ beside the sources, unless one of these sends it elsewhere.
unexport NUMBA_CACHE_DIR PYTHONPYCACHEPREFIX

# What the user gave, as options; what was not given is left to the command's defaults.
opt = $(if $($(2)),$(1) "$($(2))")
out = $(or $(OUT),$(if $(filter %.run,$(RUN)),$(RUN:.run=),$(RUN)-artifact))

.PHONY: help demo test lint calibrate fisher fit-nuq friendliness build eval bench-kmeans bench-fisher bench-decode \
	bench-decode-gpu bench-kernels bench-allocation bench-eviction bench-ideas bench-quality bench-frontier bench-scale \
	soak allocate report report-screenshots fuzz audit release-check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "variables: MODEL (folder or Hub id) DATA BITS (effective bits) SAMPLES SEQ_LEN OUT (artifact) RUN (run folder)"
	@echo "           ARGS (any further options of the kvcalib command) PYTHON WORKERS"

# The demo and the tests need no network once the packages are there; this keeps it so.
demo test: export HF_HUB_OFFLINE := 1

demo: $(RUNTIME)  ## the whole road on the embedded model, offline
	$(BIN)/kvcalib demo --out artifacts/demo

test: $(DEV)  ## the test suite
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(DEV)  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

calibrate: need-MODEL $(RUNTIME)  ## all stages: MODEL=... [BITS=2.5 DATA= SAMPLES= SEQ_LEN= OUT=]
	$(BIN)/kvcalib run "$(MODEL)" $(call opt,--bits,BITS) $(call opt,--data,DATA) $(call opt,--samples,SAMPLES) \
		$(call opt,--seq-len,SEQ_LEN) $(call opt,--out,OUT) $(ARGS)

fisher: need-MODEL need-RUN $(RUNTIME)  ## statistics of a model: MODEL= RUN= [DATA= SAMPLES= SEQ_LEN=]
	$(BIN)/kvcalib fisher "$(MODEL)" --run "$(RUN)" $(call opt,--data,DATA) $(call opt,--samples,SAMPLES) \
		$(call opt,--seq-len,SEQ_LEN) $(ARGS)

fit-nuq: need-RUN $(RUNTIME)  ## codebooks: RUN= [BITS=], with a budget also widths
	$(BIN)/kvcalib fit-nuq "$(RUN)" $(call opt,--bits,BITS) $(ARGS)

friendliness: need-RUN $(RUNTIME)  ## error of each layer's tokens: RUN=
	$(BIN)/kvcalib friendliness "$(RUN)" $(ARGS)

allocate: need-RUN $(RUNTIME)  ## widths within a budget of effective bits: RUN= BITS=
	$(BIN)/kvcalib allocate "$(RUN)" $(call opt,--budget,$(if $(BUDGET),BUDGET,BITS)) $(ARGS)

build: need-RUN $(RUNTIME)  ## artifact: RUN= [BITS= OUT=]; OUT is RUN without .run, or RUN-artifact
	$(BIN)/kvcalib build "$(RUN)" --out "$(out)" $(call opt,--bits,BITS) $(ARGS)

eval: need-RUN $(RUNTIME)  ## perplexity, KLD and bytes of the artifact: RUN= [OUT= MODEL= DATA= SAMPLES= SEQ_LEN=]
	$(BIN)/kvcalib eval "$(out)" $(call opt,--model,MODEL) $(call opt,--data,DATA) $(call opt,--samples,SAMPLES) \
		$(call opt,--seq-len,SEQ_LEN) $(ARGS)

bench-kmeans: $(RUNTIME)  ## the exact solver against scikit-learn's
	$(BIN)/python bench/kmeans.py $(ARGS)

bench-decode: $(DEV)  ## decoding on a CPU: packed caches against the fp cache, HQQ and Quanto
	$(BIN)/python bench/decode_cpu.py $(ARGS)

bench-decode-gpu: $(DEV)  ## packed attention against 16-bit SDPA on a CUDA GPU
	$(BIN)/python bench/decode_gpu.py $(ARGS)

bench-kernels: $(DEV)  ## compile every Triton kernel for sm_80 and sm_90; registers and spills
	$(BIN)/python bench/kernels_aot.py $(ARGS)

bench-allocation: $(RUNTIME)  ## where bits go: allocators, uniform splits, random plans (most of an hour)
	$(BIN)/python bench/allocation.py $(ARGS)

bench-quality: $(DEV)  ## every method at equal bytes, and the README's table and plots: [MODEL= DATA= ARGS="--eval-data ..."]
	$(BIN)/python -m pip install -c constraints.txt -e ".[bench]"
	$(BIN)/python bench/quality.py $(call opt,--model,MODEL) $(call opt,--data,DATA) $(ARGS)
	$(BIN)/python bench/quality.py --readme

bench-ideas: $(RUNTIME)  ## what was thought of against what is built, at the same bytes, simulated: [MODEL= DATA= ARGS="--eval-data ..."]
	$(BIN)/python bench/ideas.py $(call opt,--model,MODEL) $(call opt,--data,DATA) $(ARGS)

bench-frontier: $(DEV)  ## what each idea gains at equal bytes, and its tables and plots: [MODEL= DATA= ARGS="--eval-data ..."]
	$(BIN)/python bench/frontier.py $(call opt,--model,MODEL) $(call opt,--data,DATA) $(ARGS)
	$(BIN)/python bench/frontier.py --readme

bench-eviction: $(RUNTIME)  ## policies and budgets: quality, bytes, decode time, a stream without end
	$(BIN)/python bench/eviction.py $(ARGS)

bench-scale: $(RUNTIME)  ## every stage's time, memory and disk against what --dry-run said
	$(BIN)/python bench/scale.py $(ARGS)

soak: $(RUNTIME)  ## half an hour of everything on one attached model: memory flat, bits of a fresh process
	$(BIN)/python bench/soak.py $(ARGS)

report: need-RUN $(RUNTIME)  ## one HTML file of a run and its artifacts: RUN= [OUT=file.html MODEL=]
	$(BIN)/kvcalib report "$(RUN)" $(call opt,--out,OUT) $(call opt,--model,MODEL) $(ARGS)

SHOWN := fp16,kivi:bits=2,kivi:bits=4,int:bits=3,int:bits=4,nf:bits=3,turboquant:bits=3,kvquant-published
report-screenshots: demo $(DEV)  ## docs/images/report-*.png: the demo beside other methods; needs Chromium
	$(BIN)/kvcalib eval $(addprefix artifacts/demo/nuq,2.5 3 4) --model builtin --samples 8 --seq-len 512 \
		--run artifacts/demo/run --compare $(SHOWN),qaq-published,qhitter-published --recall --trials 2 --greedy 32 \
		--costs --json artifacts/demo/comparison.json
	$(BIN)/kvcalib report artifacts/demo/run --comparison artifacts/demo/comparison.json --out artifacts/demo/compared.html
	$(BIN)/python bench/report_screenshots.py artifacts/demo/compared.html $(ARGS)

# Tools of their own versions, away from what kvcalib runs with.
TOOLS := .cache/tools
$(TOOLS)/%: | $(BIN)/python .cache/tmp
	"$(PYTHON)" -m venv $(TOOLS)/$*
	$(TOOLS)/$*/bin/python -m pip install $(or $(VERSIONS_$*),$*) || { rm -rf $(TOOLS)/$*; exit 1; }
VERSIONS_release := build==1.6.1 hatchling==1.33.0
VERSIONS_audit := pip-audit==2.10.1

fuzz: export HF_HUB_OFFLINE := 1
fuzz: $(DEV)  ## lies in artifacts, at random: [ARGS="--count 20000 --seed 1 --json bench/results/fuzz.json"]
	$(BIN)/python -m tests.hostile.fuzz $(ARGS)

audit: $(TOOLS)/audit  ## known vulnerabilities of the packages in constraints.txt, by pip-audit; needs the network
	$(TOOLS)/audit/bin/python tools/audit.py constraints.txt $(ARGS)

release-check: $(TOOLS)/release  ## build HEAD twice, apart in path, umask, time and zone: the same bytes?
	$(TOOLS)/release/bin/python tools/release_check.py $(ARGS)

bench-fisher: $(RUNTIME)  ## a fisher pass against forward passes alone
	$(BIN)/python bench/fisher.py $(ARGS)

clean:  ## remove .venv, .cache (downloaded models too) and build output; artifacts stay
	rm -rf .venv .cache build dist *.egg-info .hypothesis .pytest_tmp .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

need-%:
	@: $(if $($*),,$(error $* is not set; `make` lists what each target takes))

.cache/tmp:
	mkdir -p $@

$(BIN)/python: | .cache/tmp
	@test -n "$(PYTHON)" || { echo "kvcalib needs Python 3.11 or newer: make PYTHON=/path/to/python ..." >&2; exit 2; }
	"$(PYTHON)" -m venv .venv

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python .cache/tmp
	$(BIN)/python -m pip install -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(DEV): $(RUNTIME)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,bench]"
	touch $@

# Commands make temporary files even when nothing is installed anew.
demo test lint calibrate fisher fit-nuq friendliness allocate build eval report fuzz audit release-check bench-kmeans \
	bench-fisher bench-decode bench-decode-gpu bench-kernels bench-allocation bench-eviction bench-ideas bench-quality \
	bench-scale soak: | .cache/tmp

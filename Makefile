# Everything is set up by the first target that needs it: a virtual environment in .venv, installed from
# pyproject.toml in the versions of requirements.lock.

PYTHON ?= python3
EXTRAS ?= test
CONFIG ?= configs/ood_detection/digits.py
# configs/problem/name.py:paper runs in runs/name-paper.
config_parts = $(subst :, ,$(CONFIG))
WORKDIR ?= runs/$(basename $(notdir $(word 1,$(config_parts))))$(addprefix -,$(word 2,$(config_parts)))
ARGS ?=

.PHONY: train test test-all stress lint bench lock clean

# One stamp for each set of extras, so that `make test` adds what `make train` did not need.
comma := ,
installed = .venv/.installed-$(subst $(comma),-,$(or $(1),base))

train: $(call installed,$(filter-out test,$(EXTRAS)))
	.venv/bin/python -m launch.train --config $(CONFIG) --workdir $(WORKDIR) $(ARGS)

test: $(call installed,$(EXTRAS))
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

test-all: $(call installed,$(EXTRAS))
	.venv/bin/python -m pytest -m "slow or not slow" $(ARGS)

# Three quarters of an hour on 2 cores; ARGS="--kills 10 --families lff lp_ft" for less.
stress: $(call installed,$(EXTRAS))
	.venv/bin/python -m tests.stress $(ARGS)

lint: $(call installed,$(EXTRAS))
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

# The standard set of `make bench`; `,8` is eight seeds.
standard = $(addprefix configs/speed/standard.py:,lff lff,8 lff_digits lff_digits,8 resnet_18 resnet_20 \
  wide_resnet in_context_tiny in_context_small irm)
BENCHMARKS ?= $(standard)
SCORES ?= configs/speed/standard.py:scores

# About 20 minutes on 2 cores. BENCHMARKS=configs/problem/name.py for another set; SCORES= without scores.
bench: $(call installed,torch)
	mkdir -p runs
	.venv/bin/python -m launch.benchmark $(BENCHMARKS) --against both --out runs/benchmark.json $(ARGS)
	$(if $(SCORES),.venv/bin/python -m launch.benchmark $(SCORES) --scores --against torch \
	  --out runs/benchmark_scores.json)

lock: $(call installed,$(EXTRAS))
	.venv/bin/pip install -q uv
	echo "torch==2.13.0" | .venv/bin/uv pip compile pyproject.toml --extra test --extra torch --universal \
	  --python-version 3.11 --no-annotate --no-header -c - -q -o requirements.lock
	{ echo "# What CI installs; \`make lock\` writes it anew."; cat requirements.lock; } > .lock
	mv .lock requirements.lock

clean:
	rm -rf .venv build *.egg-info

.venv/.installed-%: pyproject.toml requirements.lock | .venv/bin/python
	.venv/bin/pip install --quiet --constraint requirements.lock --editable ".$(if $(filter-out base,$*),[$(subst -,$(comma),$*)])"
	touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; make PYTHON=python3.11 (or newer)" >&2; exit 2; }
	$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "error: no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }

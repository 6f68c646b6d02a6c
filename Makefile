# make run: the main job. make test: everything that is checked. Both set up .venv by themselves on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: setup run test lint bench clean-venv

setup: .venv/.extras

# What a run needs. The pins in constraints.txt hold for CPU and CUDA builds of torch alike.
.venv/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "filtrun needs Python 3.11 or newer; try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# What the tests and the optional backbones need on top.
.venv/.extras: .venv/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

run: .venv/.core
	$(BIN)/filtrun $(ARGS)

test: .venv/.extras
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: .venv/.extras
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The device for what can run on a GPU; a folder with CIFAR-10 (and the published script) for the speed run.
DEVICE ?= cpu

bench: .venv/.extras
	$(BIN)/python -m bench.startup
	$(BIN)/python -m bench.loop_overhead --device $(DEVICE)
	$(BIN)/python -m bench.augment --device $(DEVICE)
	$(BIN)/python -m bench.decode --device $(DEVICE)
	$(BIN)/python -m bench.write --device $(DEVICE)
	$(BIN)/python -m bench.sampler --device $(DEVICE)
	$(BIN)/python -m bench.memory --device $(DEVICE)
	$(BIN)/python -m bench.speed --device $(DEVICE)
	$(BIN)/python -m bench.lut --device $(DEVICE)
	$(BIN)/python -m bench.optimizers --device $(DEVICE)
	$(BIN)/python -m bench.sweep_overhead
	$(BIN)/python -m bench.records
	$(BIN)/python -m bench.vectorize --device $(DEVICE)
	$(BIN)/python -m bench.grid
	$(if $(CIFAR),$(BIN)/python -m bench.speedrun --data $(CIFAR) $(if $(SCRIPT),--script $(SCRIPT)))
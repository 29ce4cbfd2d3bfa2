# The two commands are `make repro` and `make test`; each sets up .venv first when it has to. `make` lists the rest.

VENV   := .venv
TORCH  := torch==2.13.0
UV     := uv==0.13.9
PYTHON ?=
# TORCH, not constraints.txt, pins torch, since which build of it is the machine's choice. UV installs it all.
# PYTHON: what .venv is built from; empty takes the first on PATH that is 3.11 or newer.
# TORCH_BACKEND: the build of torch, as uv's --torch-backend (cpu, cu130, auto, ..); remembered in .venv.
ifndef TORCH_BACKEND
TORCH_BACKEND := $(shell cat $(VENV)/torch-backend 2>/dev/null)
endif
export TORCH UV PYTHON TORCH_BACKEND

# The stamp's name is its key: with another pin, another torch, or in another place, there is no stamp yet.
KEY   := $(shell { cat pyproject.toml constraints.txt .ci/setup; echo '$(TORCH) $(TORCH_BACKEND) $(CURDIR)'; } | cksum | cut -d' ' -f1)
READY := $(VENV)/ready-$(KEY)

# What make started ends with it (famba/supervision.py).
repro ablation: export FAMBA_ENDS_WITH := $(shell echo $$PPID)

# Spinning OpenMP threads make a step several times slower when something else runs on the same cores.
export OMP_WAIT_POLICY := passive
# Else every stage would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

# What gpu-check needs beside torch, triton and NumPy, and the Python of that machine.
WHEELS        := pydantic jaxtyping ruamel.yaml safetensors pandas pillow tqdm pytest hypothesis beartype
WHEELS_PYTHON ?= 3.12

IN_VENV := . $(VENV)/bin/activate &&

# Stages that `make repro` runs at the same time. A run of the default takes one core.
JOBS ?= 2

# Three for two cores, since many tests wait for what they start. A file is one worker's, for what its tests share; slow
# files come first (tests/conftest.py).
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: help env repro ablation readme crate test test-fast lint lab docs bench bench-gpu gpu-check
.PHONY: gpu-check-wheels doctor fuzz sanitize audit licences sbom clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: $(READY)  ## set up .venv: a virtual environment with everything pinned (TORCH_BACKEND=auto for a GPU)

$(READY): ; .ci/setup $(VENV) $(READY)

repro: env  ## train every strategy and draw the results: `dvc repro`, JOBS stages at a time
	$(IN_VENV) .ci/repro $(JOBS)

ablation: env  ## train what params.yaml names under ablation, for hours; NAME=options: that alone
	$(IN_VENV) dvc --wait-for-lock repro experiments/dvc.yaml:ablation$(NAME:%=@%)
	$(IN_VENV) dvc --wait-for-lock repro --force --single-item claims  # which reads what was made

readme: env  ## write the tables of README.md and docs/results.md from results/
	$(IN_VENV) python -m famba readme

crate: env  ## write results, figures and their provenance as an RO-Crate into build/crate
	rm -rf build/crate
	$(IN_VENV) python -m famba crate --out build/crate

test: env  ## run all tests: style, types, units, notebooks, pipeline
	$(IN_VENV) pytest $(WORKERS) --nbval-lax tests notebooks

test-fast: env  ## run the tests that are not marked slow
	$(IN_VENV) pytest $(WORKERS) -m "not slow" tests

lint: env  ## check style and types
	$(IN_VENV) ruff check . && ruff format --check . && pyright

# For what .gitattributes names, so that outputs of notebooks are in no diff.
lab: env  ## open the notebooks in JupyterLab
	-git config diff.ipynb.textconv '$(VENV)/bin/nbstripout -t --keep-id --extra-keys metadata.language_info'
	$(IN_VENV) jupyter lab --notebook-dir=.

docs: $(VENV)/ready-docs-$(KEY)  ## build the documentation's site in build/site
	$(IN_VENV) sphinx-build -qWE --keep-going -c docs . build/site
	cp build/site/README.html build/site/index.html

$(VENV)/ready-docs-$(KEY): $(READY)
	$(IN_VENV) pip install --quiet '$(TORCH)' -c constraints.txt -e '.[docs]'
	touch $@

bench: env  ## measure speed and memory on this machine, which should be idle: some minutes
	$(IN_VENV) python -m famba bench

bench-gpu: env  ## measure kernels and training steps on a GPU, beside mamba-ssm's: at most eight minutes
	$(IN_VENV) python -m famba bench --gpu

gpu-check: env  ## check and measure everything that famba does on a GPU: at most eight minutes
	$(IN_VENV) python -m famba gpu-check

# For a machine without a network: copy the checkout with build/wheels there, and run `python -m famba gpu-check`.
gpu-check-wheels: env  ## download to build/wheels what gpu-check needs beside torch, triton and NumPy
	$(IN_VENV) pip download --dest build/wheels --only-binary=:all: --python-version $(WHEELS_PYTHON) \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -c constraints.txt $(WHEELS)

doctor: env  ## check the environment: which backends work, why not, and how to fix it
	$(IN_VENV) python -m famba doctor

fuzz: env  ## test with thousands of damaged files and random arguments: some seven minutes
	$(IN_VENV) timeout 900 pytest -q tests/test_fuzz.py --hypothesis-profile=fuzz

sanitize: env  ## test the CPU kernels under the address and undefined-behaviour sanitizers: some minutes
	$(IN_VENV) python -m famba.kernels.cpu.sanitize

audit: env build/lock.txt  ## look for known vulnerabilities of the pinned packages, which needs pypi.org
	$(IN_VENV) uv tool run pip-audit==2.10.1 --strict --no-deps --disable-pip -r build/lock.txt

# DVC and the hub's kernels bring these; famba imports none of them. sigstore-models states no licence.
licences: env  ## check that no installed package but a few tools has a copyleft or unknown licence
	$(IN_VENV) uv tool run pip-licenses==5.5.5 --python=$(VENV)/bin/python --partial-match --fail-on='GPL;GNU;UNKNOWN' \
	  --ignore-packages asyncssh dulwich grandalf pygit2 sigstore-models

sbom: env build/lock.txt  ## list the pinned packages in build/sbom.json, in CycloneDX's format
	$(IN_VENV) uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py requirements build/lock.txt \
	  --pyproject pyproject.toml --output-reproducible -o build/sbom.json

build/lock.txt: constraints.txt Makefile
	mkdir -p build && { cat constraints.txt && echo "$(TORCH)"; } > $@

clean:  ## remove build/ and tool caches; keep results, figures, the DVC cache and .venv
	rm -rf build .pytest_cache .ruff_cache .hypothesis
	find famba tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# Targets are listed by `make help`. Everything runs in .venv, built from environment.yml's pins.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python -m
# The pip list of environment.yml, comments dropped; .venv is rebuilt when it changes, not when it is touched.
PINS := sed -n '/^ *- pip:/,$$ s/^ *- //p' environment.yml | grep -v '^pip:' | sed 's/ *\#.*//'
READY := $(VENV)/ready-$(shell $(PINS) | cksum | tr -d ' ')

# SetFit is no dependency: it has an environment of its own, with our pins where both need a package.
SETFIT_PINS := setfit==1.2.0 datasets==5.2.0
SETFIT := build/setfit/ready-$(shell { echo $(SETFIT_PINS); $(PINS); } | cksum | tr -d ' ')

NBVAL = -n $(JOBS) --dist loadfile -p tests.gate --nbval --nbval-current-env --nbval-cell-timeout 1800 $(NOTEBOOKS)

# One thread per process: results do not depend on cores, and processes share these out without waiting.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)
export OPENBLAS_NUM_THREADS ?= $(OMP_NUM_THREADS)

.DEFAULT_GOAL := help
.PHONY: help execute picture test style unit check nbval sweep drift oldest newest versions lab lab-test html format bench people lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

execute: $(READY) ## run the notebooks top to bottom and store their outputs (ARGS="-p name value" writes to build/ only)
	$(RUN) helpers.execute $(NOTEBOOKS) --jobs $(JOBS) $(ARGS)
	@test -n "$(ARGS)" || $(MAKE) --silent picture

picture: $(READY) ## take the picture of each first screen out of its notebook
	@$(VENV)/bin/python -c "import base64, glob, nbformat; \
	  shown = {'01': 'curve', '02': 'page', '03': 'guide'}; \
	  cells = [(p[10:12], c) for p in glob.glob('notebooks/0*.ipynb') for c in nbformat.read(p, 4).cells]; \
	  found = [(k, o.data) for k, c in cells for o in c.get('outputs', []) if c.id == shown[k] and 'data' in o]; \
	  [open(f'notebooks/picture_{int(k)}.png', 'wb').write(base64.b64decode(d['image/png'])) \
	   for k, d in found if 'image/png' in d]"

test: style unit check nbval ## all that CI checks: style, unit tests, stored form, and outputs that repeat

style: $(READY) ## lint, format and docstrings
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) numpydoc lint $$(find helpers -name "*.py" -not -path "helpers/study/*")

unit: $(READY) ## unit tests
	$(RUN) pytest -n $(JOBS) tests

check: $(READY) ## canonical form and house rules of the stored notebooks, without running them
	$(RUN) helpers.execute --check $(NOTEBOOKS)
	$(RUN) tests.lint $(NOTEBOOKS)

nbval: $(READY) ## run each notebook again and compare every output, figures included
	$(RUN) pytest $(NBVAL)

sweep: $(READY) ## a notebook at each point of a grid: ARGS="notebooks/NAME.ipynb --grid seed=0:100"
	$(RUN) helpers.sweep $(ARGS)

drift: $(READY) ## the notebooks under other instruction sets, threads, workers, caches: what differs (ARGS="-p n_seeds 3" for a first look)
	$(RUN) tests.drift $(NOTEBOOKS) --jobs $(JOBS) $(ARGS)

# What pyproject.toml admits, in environments of their own; torch stays as pinned, since its other
# versions bring gigabytes of CUDA. Pins have no say there, so their test is left out.
BOUNDS := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*p["dependencies"], *sum(p["optional-dependencies"].values(), []), sep="\n")

oldest: $(READY) ## unit tests and outputs with the lowest versions that pyproject.toml admits
	@$(MAKE) --silent versions AT=oldest RULE='s/>=/==/'

newest: $(READY) ## unit tests and outputs with the newest versions there are
	@$(MAKE) --silent versions AT=newest RULE='s/>=.*//'

versions: $(READY)
	"$(PYTHON)" -m venv --clear build/$(AT)
	$(VENV)/bin/python -c '$(BOUNDS)' | sed '/^torch>/d; $(RULE)' > build/$(AT)/requirements.txt
	grep '^torch==' $(VENV)/requirements.txt >> build/$(AT)/requirements.txt
	build/$(AT)/bin/python -m pip install --quiet --disable-pip-version-check -r build/$(AT)/requirements.txt
	@export PYTHONPATH="$(CURDIR)"; failed=0; \
	  build/$(AT)/bin/python -m pytest -n $(JOBS) --ignore tests/test_environment.py tests || failed=1; \
	  build/$(AT)/bin/python -m pytest $(NBVAL) || failed=1; exit $$failed

lab: $(READY) ## JupyterLab on the notebooks
	$(VENV)/bin/jupyter lab notebooks

lab-test: $(READY) ## Run All on each notebook in JupyterLab itself, in a browser, with first-look parameters
	LAB_NOTEBOOKS="$(basename $(notdir $(NOTEBOOKS)))" $(RUN) pytest tests/test_lab.py

html: $(READY) ## pages to read offline: build/html/index.html
	$(RUN) helpers.pages README.md $(NOTEBOOKS)

format: $(READY) ## format the code, notebooks included
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

bench: $(READY) ## speed ratios, measured side by side in one run each
	@for script in $(filter-out %/bench_people.py,$(wildcard tests/benchmarks/bench_*.py)); do echo "== $$script"; $(VENV)/bin/python $$script || exit 1; done

people: $(READY) $(SETFIT) ## ours against SetFit, Trainer + peft and TF-IDF: accuracy, time, memory; half an hour and more
	$(VENV)/bin/python tests/benchmarks/bench_people.py $(ARGS)

lock: ## rewrite the pins in environment.yml from what .venv holds now
	@{ sed '/^ *- pip:/q' environment.yml; \
	  $(RUN) pip freeze --exclude-editable --exclude pip --exclude setuptools | sed -E 's/\+cpu$$//; s/^/    - /'; \
	  echo '    - -e .'; } > environment.yml.new && mv environment.yml.new environment.yml

clean: ## remove what can be made again
	rm -rf $(VENV) build *.egg-info .ruff_cache

$(READY): | environment.yml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make: Python 3.11 or newer is needed and '$(PYTHON)' is not: install it, or say where: make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: Python's venv module is missing: install it (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(PINS) > $(VENV)/requirements.txt
	$(RUN) pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt
	touch $@

$(SETFIT): | $(READY)
	"$(PYTHON)" -m venv --clear build/setfit
	grep -v '^-e' $(VENV)/requirements.txt > build/setfit/constraints.txt
	build/setfit/bin/python -m pip install --quiet --disable-pip-version-check -c build/setfit/constraints.txt $(SETFIT_PINS)
	touch $@

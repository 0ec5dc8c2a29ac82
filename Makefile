# make test        everything that must hold: style, unit tests, notebooks
# make reproduce   all notebooks on the archived results, a sample of these trained again, and a report to read
# make figures     draws paper_figures/ and the README's table of results anew from the archive
# make notebooks   re-executes the committed notebooks in place
# make soak        kills trainings and damages files for at most 20 minutes (RELIABILITY.md); SOAK="--kills 20 --minutes 5"
# make cluster-test the grid of two notebooks on a one-node Slurm, which it installs: Debian, as root; not in make test
# make clean       removes what the other targets made
#
# PYTHON chooses the interpreter that the environment in .venv is made of: make test PYTHON=python3.13
# CONSTRAINTS fixes versions, the archived results' for instance: make test CONSTRAINTS=constraints.txt
# PIP_OPTIONS goes to pip as it is: make test PIP_OPTIONS="--extra-index-url ADDRESS"

# Only for an environment that is empty altogether.
PATH ?= /usr/local/bin:/usr/bin:/bin
export PATH

PYTHON ?= python3
SIZE   ?= archive
OUT    ?= report

CONSTRAINTS ?=
PIP_OPTIONS ?=

BIN      := .venv/bin
READY    := .venv/.ready
COMPILED := .venv/.compiled

# One thread per process: two tests or kernels run side by side, and trained numbers do not depend on the machine's cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1

# The pip that comes with Python 3.11 takes nearly twice as long, for torch's libraries above all.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_OPTIONS)

.PHONY: test reproduce figures notebooks soak cluster-test clean

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	    { echo "binvit needs Python 3.11 or newer; choose one with make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip
	$(INSTALL) $(addprefix --constraint=,$(CONSTRAINTS)) -e ".[test]"
	touch $@

# Kernels are compiled once, beside modules or mypy, so that neither notebooks nor several tests at the same time wait for them.
WARM_UP := $(ONE_THREAD) $(BIN)/python -m binvit warm-up

# Modules are compiled on all cores, but for packages' own tests and tools and large parts that nothing here imports; pip
# would use one core, for all of them. Some have templates that are no Python, which is no fault.
UNUSED  := tests?|testing|_inductor|debugpy|pygments|onnxruntime|pip|mypyc?|setuptools
COMPILE := { $(BIN)/python -m compileall -q -j 0 -x '/($(UNUSED))/' .venv/lib >/dev/null 2>&1 || true; }

$(COMPILED): $(READY)
	$(WARM_UP) & kernels=$$!; $(COMPILE); wait $$kernels && touch $@

# tests/conftest.py has the order of the tests.
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(WARM_UP) & kernels=$$!; \
	    { test $(COMPILED) -nt $(READY) || $(COMPILE); } & modules=$$!; \
	    $(BIN)/mypy; types=$$?; wait $$modules && wait $$kernels && touch $(COMPILED) && exit $$types
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env \
	    --nbval-sanitize-with notebooks/nbval.cfg --nbval-cell-timeout 300 tests notebooks

reproduce: $(COMPILED)
	$(BIN)/python -m binvit reproduce --size $(SIZE) --out $(OUT)

figures: $(COMPILED)
	$(ONE_THREAD) $(BIN)/python -m binvit figures

notebooks: $(COMPILED)
	$(ONE_THREAD) $(BIN)/python -m binvit.lab.notebooks.refresh notebooks/*.ipynb

soak: $(READY)
	$(ONE_THREAD) $(BIN)/python tests/soak.py $(SOAK)

cluster-test: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -e ".[notebooks,cluster]"
	$(ONE_THREAD) $(BIN)/python tests/cluster_test.py

clean:
	rm -rf .venv report results notebooks/results .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find binvit tests notebooks -name __pycache__ -prune -exec rm -rf {} +

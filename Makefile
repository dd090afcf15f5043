# Every target sets up what it needs, once, in .venv. Python 3.10 or newer and make are enough.
#
#   make demo          start a cluster, serve a model, ask it, stop        (KEEP=1: stay up until Ctrl-C)
#   make test          lint, types, import contracts and the quick tests   (ARGS="-k router": passed to pytest;
#                                                                           JOBS=0: in one process, for --pdb)
#   make test-all      the same with the slow tests
#   make test-oldest   the tests with the oldest distributed that is promised, in .venv-oldest
#   make clusters      Debian's packages for the slow tests (apt-get, as root): SLURM, OpenSSH and Prometheus
#   make bench         the benchmarks, several minutes                     (ARGS="--quick")
#   make bench-peers   beside other servers, each in .venv-peers/<peer>; 15 minutes and 1 GB   (ARGS="--quick")
#   make bench-overload  too much to do, beside the same; 5 minutes          (ARGS="--quick")
#   make clean         remove environments and caches

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2
RUN := $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# Hundreds of processes are started by the tests: none compiles what another one has.
export PYTHONDONTWRITEBYTECODE :=
# A file's tests share a cluster, and run one after the other.
PYTEST := -m pytest -n $(JOBS) --dist loadfile
METADATA := setup.py pyproject.toml
OLDEST := 2025.9.0
PEERS := $(patsubst benchmarks/peers/requirements/%.txt,%,$(wildcard benchmarks/peers/requirements/*.txt))

.PHONY: help demo test test-all test-oldest clusters lint bench bench-peers bench-overload clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.examples
	@$(RUN) -m examples.demo $(if $(KEEP),--keep) $(ARGS)

test: lint
	$(RUN) $(PYTEST) $(ARGS)

test-all: lint
	$(RUN) $(PYTEST) -m "" $(ARGS)

test-oldest:
	@$(MAKE) --no-print-directory VENV=.venv-oldest .venv-oldest/.oldest
	.venv-oldest/bin/python $(PYTEST) -m "" $(ARGS)

# Their services are not started: the tests have daemons of their own.
clusters:
	$(if $(filter-out 0,$(shell id -u)),sudo) env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
	  apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge openssh-server openssh-client prometheus

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.dev
	@$(RUN) -m benchmarks $(ARGS)

bench-peers: $(VENV)/.dev $(PEERS:%=.venv-peers/%/.installed)
	@$(RUN) -m benchmarks.peers $(ARGS)

bench-overload: $(VENV)/.bench $(PEERS:%=.venv-peers/%/.installed)
	@$(RUN) -m benchmarks.peers.overload $(ARGS)

# A peer's packages are pinned, all of them, and never meet those of another one or of dask_serve.
.venv-peers/%/.installed: benchmarks/peers/requirements/%.txt
	@$(MAKE) --no-print-directory VENV=.venv-peers/$* .venv-peers/$*/pyvenv.cfg
	@echo 'Installing $* into .venv-peers/$*, once, a few minutes'
	@.venv-peers/$*/bin/python -m pip --disable-pip-version-check --quiet install --requirement $<
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-peers build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,what,stamp): pip prints hundreds of lines; show a dot for each package instead, and keep its errors.
define install
	@printf 'Installing %s into $(VENV), once, a minute or two: ' '$(1)'; rm -f $(2); \
	{ $(PIP) install --editable '.[$(1)]' $(3) && touch $(2); } \
	  | while read -r word rest; do if [ "$$word" = Collecting ]; then printf .; fi; done; \
	if [ -f $(2) ]; then echo ' done'; else echo ' failed (see above)'; exit 1; fi
endef

$(VENV)/.examples: $(VENV)/pyvenv.cfg $(METADATA)
	$(call install,examples,$@)

$(VENV)/.dev: $(VENV)/pyvenv.cfg $(METADATA)
	$(call install,dev,$@)

$(VENV)/.bench: $(VENV)/pyvenv.cfg $(METADATA)
	$(call install,bench,$@)

$(VENV)/.oldest: $(VENV)/pyvenv.cfg $(METADATA)
	$(call install,dev,$@,dask==$(OLDEST) distributed==$(OLDEST))

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and \
	  "dask_serve needs Python 3.10 or newer, $(PYTHON) is %d.%d: make PYTHON=/path/to/python3.11" % v[:2])'
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "No virtual environment could be made (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }

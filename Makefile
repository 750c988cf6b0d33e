# make demo    the whole pipeline on synthetic phantoms, in demo/
# make test    what continuous integration runs
# make nano    the bundled weights, pretrained again in nano/; three and a half hours
#
# Needs make, bash and Python 3.10 or newer; everything else goes into .venv, once.

SHELL := bash
CANDIDATES := python3.11 python3.12 python3.13 python3.10 python3
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))
ifndef PYTHON
PYTHON := $(shell for python in $$(type -aP $(CANDIDATES)); do "$$python" -c '$(USABLE)' 2>/dev/null && echo "$$python" && break; done)
endif
VENV := .venv

export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export SAM2_BUILD_CUDA := 0
# Each command that a test starts would compile hundreds of modules again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test install nano

demo: $(VENV)/installed
	$(VENV)/bin/slmsam2 demo -o demo

test: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest -n auto --dist loadfile --no-loadscope-reorder

# In three parts. May be interrupted and called again.
NANO_FIRST := nano/first/nano.safetensors
NANO_SECOND := nano/second/nano.safetensors

nano: $(VENV)/installed
	test -e nano/first.done || $(VENV)/bin/slmsam2 pretrain -o nano/first $(if $(wildcard nano/first/recipe.json),--continue)
	touch nano/first.done
	test -e nano/second.done || $(VENV)/bin/slmsam2 pretrain -o nano/second $(if $(wildcard nano/second/recipe.json),--continue,\
		--recipe slmsam2_cli/assets/nano-longer.json --weights $(NANO_FIRST))
	touch nano/second.done
	test -e nano/third.done || $(VENV)/bin/slmsam2 pretrain -o nano/third $(if $(wildcard nano/third/recipe.json),--continue,\
		--recipe slmsam2_cli/assets/nano-through.json --weights $(NANO_SECOND))
	touch nano/third.done

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 or newer with venv was found. Name one: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 2; }
	@echo "installing into $(VENV); this takes a few minutes, once"
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@

# make demo | demo-jam | test | lint | venv      PYTHON=python3.12: another interpreter, with an environment of its own
PYTHON ?= python3
ifeq ($(PYTHON),python3)
VENV ?= .venv
else
VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
TESTS ?= tests
TORCH := torch>=2.10,<2.14

.PHONY: venv demo demo-jam test lint

venv: $(VENV)/.installed

# torch comes first: the compiled losses are built against it, without build isolation.
$(VENV)/.installed: pyproject.toml $(wildcard setup.py csrc/* csrc/*/*)
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("Python %d.%d is too old: make PYTHON=python3.11 (or later)" % v)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet "setuptools>=77" wheel
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

demo: venv
	$(VENV)/bin/python examples/mug/demo.py

demo-jam: venv
	$(VENV)/bin/python examples/jam/demo.py

test: venv
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile $(TESTS)

lint: venv
	$(VENV)/bin/python -m ruff check .

# make demo | demo-jam | demo-real | test | lint | venv      PYTHON=python3.12: another interpreter, with an environment of its own
PYTHON ?= python3
ifeq ($(PYTHON),python3)
VENV ?= .venv
else
VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
TESTS ?= tests
TORCH := torch>=2.10,<2.14

.PHONY: venv demo demo-jam demo-real test lint

venv: $(VENV)/.installed

# torch comes first: the compiled losses are built against it, without build isolation.
$(VENV)/.installed: pyproject.toml $(wildcard setup.py csrc/* csrc/*/* csrc/*/*/*)
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("Python %d.%d is too old: make PYTHON=python3.11 (or later)" % v)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet "setuptools>=77" wheel
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	$(VENV)/bin/python -m pip install --quiet --no-deps 'timm>=1.0'  # its RandAugment; torchvision goes with one torch
	touch $@

demo: venv
	$(VENV)/bin/python examples/mug/demo.py

demo-real: venv
	$(VENV)/bin/python examples/transfer/demo.py

demo-jam: venv
	$(VENV)/bin/python examples/jam/demo.py

# GPUs are hidden from the suite (tests/conftest.py). Where there is one, the tests marked `gpu` have a process of their
# own, which sees it; elsewhere the suite tells that they are skipped. Both are run, and one that fails fails the whole.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q
GPU_TESTS = $(patsubst tests,tests/gpu,$(filter tests tests/gpu%,$(TESTS)))
OTHER_TESTS = $(filter-out tests/gpu%,$(TESTS))

test: venv
ifneq ($(filter GPU,$(shell nvidia-smi -L 2>/dev/null)),)
	code=0; \
	if [ -n "$(OTHER_TESTS)" ]; then $(PYTEST) -n 2 --dist loadfile --ignore=tests/gpu $(OTHER_TESTS) || code=$$?; fi; \
	if [ -n "$(GPU_TESTS)" ]; then $(PYTEST) -m gpu $(GPU_TESTS) || code=$$?; fi; \
	exit $$code
else
	$(PYTEST) -n 2 --dist loadfile $(TESTS)
endif

lint: venv
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/lint-imports --no-logo --no-cache

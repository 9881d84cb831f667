PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint clean

# Extract, match and compare on the rendered places that the project contains
demo: $(VENV)/.installed
	@$(RUN) tools/demo.py

# One thread for each of two processes: torch's threads wait for each other wherever another process takes a core
test: $(VENV)/.installed-test lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m pytest -q -n 2

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py | $(VENV)/bin/python
	$(VENV)/bin/pip install --disable-pip-version-check -q -e .
	@touch $@

$(VENV)/.installed-test: setup.py | $(VENV)/bin/python
	$(VENV)/bin/pip install --disable-pip-version-check -q -e '.[test]'
	@# kapture's own requirements would replace the headless OpenCV; what tests drive of it needs only these
	@$(VENV)/bin/pip install --disable-pip-version-check -q cvxpy numba numpy-quaternion && \
		$(VENV)/bin/pip install --disable-pip-version-check -q --no-deps kapture kapture-localization || \
		echo "kapture cannot be installed: the tests that drive it will be skipped"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test soak lint clean

# Extract, match and compare on the rendered places that the project contains
demo: $(VENV)/.installed
	@$(RUN) tools/demo.py

# One thread for each of two processes: torch's threads wait for each other wherever another process takes a core
test: $(VENV)/.installed-test lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m pytest -q -n 2

# Hours of interrupted runs in minutes; docs/reliability.md says what it found
soak: $(VENV)/.installed-test
	$(RUN) benchmarks/soak.py --moments 50

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# uv takes the build of torch that suits the machine: without a GPU the small one for processors. Where only the usual
# package index can be reached pip takes what is there.
INSTALL = $(RUN) -m uv pip install -q --torch-backend auto -e $(1) 2>$(VENV)/uv.log || \
	{ echo "installing with pip (uv: $$(grep -m 1 -i error $(VENV)/uv.log))"; \
	$(VENV)/bin/pip install --disable-pip-version-check -q -e $(1); }

$(VENV)/bin/uv: | $(VENV)/bin/python
	$(VENV)/bin/pip install --disable-pip-version-check -q uv

$(VENV)/.installed: setup.py | $(VENV)/bin/uv
	@$(call INSTALL,.)
	@touch $@

$(VENV)/.installed-test: setup.py | $(VENV)/bin/uv
	@$(call INSTALL,'.[test]')
	@# kapture's own requirements would replace the headless OpenCV; what tests drive of it needs only these
	@$(VENV)/bin/pip install --disable-pip-version-check -q cvxpy numba numpy-quaternion && \
		$(VENV)/bin/pip install --disable-pip-version-check -q --no-deps kapture kapture-localization || \
		echo "kapture cannot be installed: the tests that drive it will be skipped"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

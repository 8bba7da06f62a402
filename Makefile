# What .ci/run runs, by parts. `make` lists them.
.PHONY: help test attacks coverage lint types tables docs check demo wheel minimum

help:  ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

test:  ## all tests, about a quarter of an hour on two cores
	pytest -n 2

attacks:  ## 600 attacks on what README and docs promise, about five minutes
	python tests/attacks/engine.py
	python tests/attacks/files.py

CORE = ops native philox triton compile backends adapt objectives lora draws optimizers out_of_memory bad_input threads

coverage:  ## the tests of the core, and the lines of kernels, step and parameters that they leave out
	pytest -q -n 2 --cov --cov-report= $(CORE:%=tests/test_%.py)
	coverage report --include='*/kernels/*,*/step.py,*/parameters.py' --fail-under=95

lint:  ## ruff, without changing a file
	ruff check .
	ruff format --check .

types:  ## mypy, strict
	mypy

tables:  ## README's and docs' tables against bench/results
	python bench/readme.py --check

docs:  ## the site in site/, a warning being an error
	mkdocs build --strict

check: lint types tables docs test  ## all of these

demo:  ## the digits before and after adaptation
	dtta demo

wheel:  ## sdist, wheel and pure wheel in dist/, each run in a fresh environment without a compiler
	.ci/wheels

minimum:  ## the tests of the core on the lowest versions that are allowed
	.ci/minimum

# What .ci/run runs, by parts. `make` lists them.
.PHONY: help test lint types tables check demo wheel

help:  ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

test:  ## all tests, about ten minutes on two cores
	pytest

lint:  ## ruff, without changing a file
	ruff check .
	ruff format --check .

types:  ## mypy, strict
	mypy

tables:  ## README's and docs' tables against bench/results
	python bench/readme.py --check

check: lint types tables test  ## all of these

demo:  ## the digits before and after adaptation
	dtta demo

wheel:  ## a wheel in dist/, with the native library where there is a compiler
	pip wheel --no-deps --wheel-dir dist .

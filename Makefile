# The parts of .ci/run, and a few more. `make` lists them.
.PHONY: help quick test slow attacks coverage lint types tables docs check demo wheel minimum

help:  ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

quick:  ## ops, step, adapt(), the commands and one demo, in a minute
	pytest -m quick

test:  ## all tests but the slow ones
	pytest -n 2

slow:  ## packages, compiled engines, soak tests, and what needs another program
	pytest -n 2 -m slow --dist loadfile

attacks:  ## 600 attacks on what README and docs promise, about five minutes
	python tests/attacks/engine.py
	python tests/attacks/files.py

CORE = ops native philox triton compile backends adapt objectives lora draws optimizers out_of_memory bad_input guard_forwards
OTHERS = not (cuda-89 or cuda-90 or cuda-100 or cuda-120)

coverage:  ## the tests of the core, slow ones too, for one GPU of each maker, and the lines of kernels, step and parameters that they leave out
	pytest -q -n 2 -m "slow or not slow" -k "$(OTHERS)" --cov --cov-report= $(CORE:%=tests/test_%.py)
	coverage report --include='*/kernels/*,*/step.py,*/parameters.py' --fail-under=95

lint:  ## ruff, without changing a file
	ruff check .
	ruff format --check .

types:  ## mypy, strict
	.ci/types

tables:  ## README's and docs' tables against bench/results
	python bench/readme.py --check

docs:  ## the site in site/, a warning being an error
	mkdocs build --strict

check: lint types tables docs test  ## all of these, in eight minutes on two cores

demo:  ## the digits before and after adaptation
	dtta demo

wheel:  ## sdist, wheel and pure wheel in dist/, each run in a fresh environment without a compiler
	.ci/wheels

minimum:  ## the tests of the core on the lowest versions that are allowed
	.ci/minimum

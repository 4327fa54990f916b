# `make` lists what there is. Everything runs in .venv, which is made on first use; give
# VENV=/path to use an environment of your own as it is, PYTHON=/path to choose the interpreter.

.DEFAULT_GOAL := help
.PHONY: help up down test proofs lint format types imports migrations check bench chaos manage lock clean venv venv-dev

ifeq ($(origin VENV), undefined)
VENV := .venv
bootstrap = @sh project/stack/bootstrap.sh "$(VENV)"
else
bootstrap = @true # given: used as it is, not
endif
PYTHON ?=
python = "$(VENV)/bin/python"

# How many tests run at a time, and what else pytest is told: make test ARGS="tests/unit -k price"
TEST_WORKERS ?= 2
ARGS ?=
UV ?= uv

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

venv:
	$(bootstrap) requirements.lock "$(PYTHON)"

venv-dev:
	$(bootstrap) requirements-dev.lock "$(PYTHON)"

up: venv ## start everything here; Ctrl-C ends it (PORT, DATABASE_URL, REDIS_URL are honoured)
	@exec $(python) -m project.stack up --with-parent

down: ## end what `make up` started, from another shell
	@test -x $(python) || { echo "nothing is running"; exit 0; }; exec $(python) -m project.stack down

manage: venv ## manage.py with the settings of what is up: make manage ARGS="add_provider --help"
	@exec $(python) -m project.stack manage $(ARGS)

pytest = $(python) -m project.stack run -- $(python) -m pytest -n $(TEST_WORKERS) --dist worksteal

test: venv-dev ## run the tests on real servers of their own
	@exec $(pytest) $(ARGS)

proofs: venv-dev ## the short forms of what `make chaos` proves and `make bench` measures
	@exec $(pytest) tests/chaos tests/benchmarks $(ARGS)

lint: venv-dev ## style: ruff check, ruff format --check
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .

format: venv-dev ## put the style right
	@$(python) -m ruff check --fix .
	@$(python) -m ruff format .

types: venv-dev ## mypy, strict
	@SECRET_KEY=types $(python) -m mypy

imports: venv-dev ## import directions
	@"$(VENV)/bin/lint-imports"

migrations: venv-dev ## fail if a model changed without a migration
	@exec $(python) -m project.stack run -- env SECRET_KEY=check $(python) manage.py makemigrations --check --dry-run

check: lint types imports migrations test proofs ## all of the above

bench: venv-dev ## load tests; tables on the screen, JSON under .data/bench
	@exec $(python) -m project.stack --data .data/bench/servers run --durable -- $(python) -m tests.benchmarks $(ARGS)

chaos: venv-dev ## proofs by killing things; tables on the screen, JSON under .data/bench
	@exec $(python) -m project.stack --data .data/bench/servers run --durable -- $(python) -m tests.chaos $(ARGS)

lock: ## resolve pyproject.toml anew into the two lock files (needs uv)
	@$(UV) pip compile --quiet --universal --generate-hashes --no-header pyproject.toml -o requirements.lock
	@$(UV) pip compile --quiet --universal --generate-hashes --no-header pyproject.toml --group dev -o requirements-dev.lock

clean: down ## remove the environment and every cache; .data (your data) stays
	@rm -rf .venv .venv.lock .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis staticfiles .coverage*

"""Proofs by breaking things: `make chaos` runs them in full (minutes each), tests a short form.

    python -m tests.chaos [NAME…] [--short] [--out FOLDER] [--number N]

A proof is a module, named in `PROOFS` in `__main__.py`, with

    run(clusters, is_short) -> dict    break things, return the figures (plain JSON)
    CONDITIONS                         {"lost = 0": lambda found: found["lost"] == 0, …}
    COLUMNS                            {field: heading} of the table on the screen
    rows(found) -> list of dicts       its lines

`clusters(**options)` is `Cluster.fresh`: real processes, a database and a Redis database
of their own (tests/acceptance/cluster.py). `submit.py` sends tasks over the REST API, again and
again until each was taken; `audit.py` is the judge: triggers in the database and the sandbox's own
counts, independent of the code under test.

Figures are written to `.data/bench/chaos-<name>.json`. A condition that does not hold makes the
exit code 1, and the processes' logs are kept. A proof that raises `NotRun` counts as failed too.

It needs DATABASE_URL and REDIS_URL of servers that it may fill: `make chaos` starts some.
"""


class NotRun(Exception):
    """A proof lacks what it needs, and has shown nothing."""

"""Load on the project's own web server and workers; `make bench` runs it, no test does.

    python -m tests.benchmarks [--quick] [--rounds N] [--upstream nginx|sandbox] [--out FOLDER]

It needs DATABASE_URL and REDIS_URL of servers that it may fill: `make bench` starts some. Load
goes to loopback only.
"""

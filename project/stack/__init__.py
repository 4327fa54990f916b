"""The whole stack on one machine: real servers from wheels, and everything that runs on them.

    python -m project.stack up                   what `make up` runs
    python -m project.stack down                 ends it, from any shell
    python -m project.stack run -- COMMAND …     servers of their own around one command

`up` and `run` each are one process, the owner, which holds the embedded servers as children,
starts again what dies, and ends everything when it ends.
"""

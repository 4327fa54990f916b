"""`python -m project.stack up | down | run -- COMMAND | manage COMMAND`."""

import argparse
import sys
from collections.abc import Sequence

from project.stack.errors import StackError, Stopped
from project.stack.layout import ROOT


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m project.stack", description=__doc__)
    result.add_argument("--data", help="where everything is kept (default: .data)")
    verbs = result.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="start everything and stay")
    up.add_argument("--with-parent", action="store_true", help="end when the parent dies")
    verbs.add_parser("down", help="end what `up` started")
    run = verbs.add_parser("run", help="real servers around one command")
    run.add_argument("--durable", action="store_true", help="with fsync, as `up` has it")
    run.add_argument("command", nargs=argparse.REMAINDER)
    manage = verbs.add_parser("manage", help="manage.py with the settings of what is up")
    manage.add_argument("command", nargs=argparse.REMAINDER)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        return dispatch(given)
    except StackError as error:
        sys.stderr.write(f"llmtasks: {error}\n")
        return 1
    except (KeyboardInterrupt, Stopped):
        return 130


def dispatch(given: argparse.Namespace) -> int:
    # Each verb imports what it needs: `down` must work whatever else is broken.
    if given.verb == "down":
        from project.stack.down import down

        return down(given.data or ROOT / ".data")
    if given.verb == "run":
        from project.stack import run

        command = given.command[1:] if given.command[:1] == ["--"] else given.command
        return run.main(given.data or str(ROOT / ".data" / "test"), command, given.durable)
    if given.verb == "manage":
        from project.stack.manage import manage

        return manage(given.data or ROOT / ".data", given.command)
    from project.stack.up import up

    return up(given.data or ROOT / ".data", with_parent=given.with_parent)


if __name__ == "__main__":
    raise SystemExit(main())

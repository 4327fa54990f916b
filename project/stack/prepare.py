"""Brings the database to the present: tables, static files, the demo. One process for all."""

import io

import django


def prepare() -> None:
    from django.core.management import call_command

    call_command("migrate", verbosity=0, interactive=False)
    call_command("seed_demo", stdout=io.StringIO())
    call_command("collectstatic", verbosity=0, interactive=False)


if __name__ == "__main__":
    django.setup()
    prepare()

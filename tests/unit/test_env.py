"""Settings come from the environment; a bad one names itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from project import env

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def given(monkeypatch):
    monkeypatch.setattr(env, "KNOWN", {})
    return lambda value: monkeypatch.setenv("X_TEST", value)


def test_a_default_holds_where_nothing_is_given(given):
    assert env.text("X_TEST", "a", "about") == "a"
    given("  ")
    assert env.text("X_TEST", "a", "about") == "a"
    given(" b ")
    assert env.text("X_TEST", "a", "about") == "b"
    assert env.KNOWN["X_TEST"].about == "about"


@pytest.mark.parametrize(
    ("value", "meaning"),
    [("1", True), ("TRUE", True), ("yes", True), ("on", True), ("0", False), ("off", False)],
)
def test_booleans(given, value, meaning):
    given(value)
    assert env.boolean("X_TEST", not meaning, "about") is meaning


@pytest.mark.parametrize("read", [
    lambda: env.boolean("X_TEST", False, ""),
    lambda: env.integer("X_TEST", 1, ""),
    lambda: env.seconds("X_TEST", 1, ""),
])  # fmt: skip
def test_what_cannot_be_read_names_the_setting(given, read):
    given("maybe")
    with pytest.raises(ImproperlyConfigured, match="X_TEST is 'maybe'"):
        read()


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_number_out_of_range_names_the_setting(given, value):
    given(value)
    with pytest.raises(ImproperlyConfigured, match="X_TEST"):
        env.seconds("X_TEST", 1, "", least=0.5)


def test_lists(given):
    given(" a, b ,,c ")
    assert env.csv("X_TEST", "", "") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEBUG", "perhaps"),
        ("DB_POOL_SIZE", "many"),
        ("DB_POOL_SIZE", "1"),
        ("WORKER_CONCURRENCY", "0"),
        ("PROVIDER_SHARE", "0"),
        ("PROVIDER_SHARE", "1.5"),
        ("LEASE_S", "3"),
        ("DROP_AFTER_S", "1"),
        ("RENEW_S", "0"),
        ("CLIENT_LEFT", "wait"),
        ("METRICS_TOKEN", "too-short"),
        ("DATABASE_URL", "not a url"),
        ("SECRET_KEY", ""),
    ],
)
def test_a_bad_setting_stops_the_process_with_its_name(name, value):
    environment = {**os.environ, "SECRET_KEY": "x" * 50, name: value}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    done = subprocess.run(
        [sys.executable, "-c", "import project.settings"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "ImproperlyConfigured" in done.stderr
    assert name in done.stderr.splitlines()[-1]

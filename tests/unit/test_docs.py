"""The docs name everything that there is, and nothing that there isn't."""

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
from django.core.management import load_command_class
from django.urls import URLPattern, URLResolver

import llmtasks.api.errors
import llmtasks.errors
import providers.errors
from llmtasks.api.errors import ENDINGS
from llmtasks.api.urls import urlpatterns
from llmtasks.errors import ApiError
from project.env import KNOWN
from providers import registry
from providers.sandbox_answers import behaviour

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SETTING_ROW = re.compile(r"^\| `([A-Z_]+)` \| (.*?) \| (.*) \|$", re.MULTILINE)
TARGET = re.compile(r"^([a-z-]+):.*## ", re.MULTILINE)
# Read by project/stack and by seed_demo, not by Django's settings.
OF_THE_STACK = {"PORT", "FLOWER_PORT", "SANDBOX_PORT", "BIND", "WEB_WORKERS", "WEB_THREADS"}


def text(page: str) -> str:
    return TEXTS[page]


def commands() -> list[str]:
    folder = ROOT / "llmtasks" / "management" / "commands"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def flags_of(app: str, command: str) -> set[str]:
    parser = load_command_class(app, command).create_parser("manage.py", command)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    return {flag for flag in flags if flag.startswith("--")}


def classes(module: ModuleType) -> list[str]:
    return [
        name
        for name, found in vars(module).items()
        if inspect.isclass(found)
        and issubclass(found, Exception)
        and found.__module__ == module.__name__
    ]


def refusals() -> list[type[ApiError]]:
    found = [*vars(llmtasks.errors).values(), *vars(llmtasks.api.errors).values()]
    return [kind for kind in found if inspect.isclass(kind) and issubclass(kind, ApiError)]


def api_paths() -> list[str]:
    """The paths of urls.py as the docs write them: /v1/tasks/{task_id}."""
    paths = []
    for pattern in urlpatterns:
        assert isinstance(pattern, URLPattern | URLResolver)
        route = str(pattern.pattern)
        if not route.startswith("^"):
            paths.append("/" + re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", route))
    return paths


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    plain = re.sub(r"[^\w\s-]", "", heading.strip().lower())
    return re.sub(r"\s", "-", plain)


def anchors(page: str) -> set[str]:
    without_code = CODE.sub("", text(page))
    return {slug(line.lstrip("#")) for line in without_code.splitlines() if line.startswith("#")}


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_setting_is_documented_with_its_default(name: str) -> None:
    rows = {row[0]: row[1] for row in SETTING_ROW.findall(text("docs/settings.md"))}
    assert name in rows, f"{name} is not in docs/settings.md"
    assert rows[name] == (KNOWN[name].default or "none")


def test_no_setting_is_documented_that_is_not_read() -> None:
    rows = {row[0] for row in SETTING_ROW.findall(text("docs/settings.md"))}
    assert rows == set(KNOWN) | OF_THE_STACK


@pytest.mark.parametrize("name", sorted(OF_THE_STACK))
def test_settings_of_the_stack_are_read_there(name: str) -> None:
    assert f'"{name}"' in (ROOT / "project" / "stack" / "environment.py").read_text()


@pytest.mark.parametrize(
    "name",
    [
        *classes(providers.errors),
        *classes(llmtasks.errors),
        *classes(llmtasks.api.errors),
    ],
)
def test_every_error_class_is_documented(name: str) -> None:
    assert f"`{name}`" in text("docs/errors.md")


@pytest.mark.parametrize("name", sorted(ENDINGS))
def test_the_status_of_every_ending_is_documented(name: str) -> None:
    [row] = [
        line for line in text("docs/errors.md").splitlines() if line.startswith(f"| `{name}` |")
    ]
    assert row.endswith(f"| {ENDINGS[name].status} | `{ENDINGS[name].code}` |")


@pytest.mark.parametrize("kind", refusals())
def test_the_status_of_every_refusal_is_documented(kind: type[ApiError]) -> None:
    for line in text("docs/errors.md").splitlines():
        if line.startswith(f"| `{kind.__name__}` |"):
            assert line.startswith(f"| `{kind.__name__}` | {kind.status} | `{kind.code}` |")


@pytest.mark.parametrize("name", commands())
def test_every_command_is_documented_with_its_flags(name: str) -> None:
    page = text("docs/commands.md")
    assert f"`{name}`" in page or f"### {name}" in page
    for flag in flags_of("llmtasks", name) - flags_of("django.core", "migrate") - {"--loglevel"}:
        assert flag in page, f"{name} {flag}"


def test_no_command_is_documented_that_is_not_there() -> None:
    page = text("docs/commands.md")
    named = set(re.findall(r"^### (\w+)$", page, re.MULTILINE))
    named |= set(re.findall(r"manage\.py ([a-z_]+)", "".join(TEXTS.values())))
    assert named <= {*commands(), "migrate"}


def test_make_targets_and_docs_agree() -> None:
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))
    documented = set(re.findall(r"^\| `make ([a-z-]+)` \|", text("docs/commands.md"), re.MULTILINE))
    assert documented == targets
    mentioned = set(re.findall(r"`make ([a-z-]+)", "".join(TEXTS.values())))
    assert mentioned <= targets


@pytest.mark.parametrize("path", api_paths())
def test_every_path_is_documented(path: str) -> None:
    assert re.search(rf"`(GET|POST) {re.escape(path)}`", text("docs/api.md"))


def test_no_path_is_documented_that_is_not_there() -> None:
    documented = set(re.findall(r"`(?:GET|POST) (/[^`]*)`", text("docs/api.md")))
    assert documented <= set(api_paths())


@pytest.mark.parametrize("name", registry.adapters())
def test_every_adapter_is_documented_with_its_options(name: str) -> None:
    page = text("docs/providers.md")
    assert re.search(rf"^\| `{name}` \|", page, re.MULTILINE)
    for option in registry.adapter_class(name).options:
        assert f"`{option}`" in page


def test_models_of_the_sandbox_are_documented_as_it_knows_them() -> None:
    section = text("docs/providers.md").partition("## The sandbox\n")[2].partition("\n###")[0]
    for name in re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE):
        concrete = name.replace("<status>", "503")
        assert behaviour(re.sub(r"<\w+>", "5", concrete)), name


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_links_lead_somewhere(page: str) -> None:
    for link in LINK.findall(CODE.sub("", text(page))):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        place, _, anchor = link.partition("#")
        target = (ROOT / page).parent / place if place else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_python_in_the_docs_compiles(page: str) -> None:
    for language, code in CODE.findall(text(page)):
        if language == "python":
            ast.parse(code)


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_files_that_are_named_exist(page: str) -> None:
    """`llmtasks/call.py` and the like, so that a rename is not forgotten."""
    plain = CODE.sub("", text(page))
    for name in re.findall(r"`((?:llmtasks|providers|project|tests|docs)/[\w/.-]+\.\w+)`", plain):
        assert (ROOT / name).exists(), f"{page}: {name}"


def test_every_decision_is_listed() -> None:
    index = text("docs/decisions/README.md")
    for path in (DOCS / "decisions").glob("0*.md"):
        assert f"({path.name})" in index

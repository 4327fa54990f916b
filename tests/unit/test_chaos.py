"""The proofs' own judge and programme: what is wrong is seen, and makes the exit code 1."""

import json
from types import SimpleNamespace

import pytest

from tests.benchmarks import machine
from tests.chaos import __main__ as chaos
from tests.chaos import agents, audit, kills, runs, submit, traces
from tests.chaos.bursts import Bursts, victims

# status, attempts, cost, cost_state, owner, error, route, kind, each after the id
DONE = ("a", "succeeded", 1, 5, "final", None, "", "echo", "chat")
# number, state, error_class, http_status, cost, cost_state, step
BILLED = (1, "settled", "", 200, 5, "final", 0)
UNKNOWN = (1, "unknown", "", None, 3, "estimated", 0)
TURNS = ("a", "succeeded", 2, 10, "final", None, "", "echo", "agent")
DIED = ("a", "failed", 5, 15, "estimated", None, "Interrupted", "echo", "chat")
SEEN = {"calls": 1, "answered": 1, "overlaps": 0}


def test_ends():
    tasks = {"a": DONE, "b": ("b", "waiting", *DONE[2:]), "c": DONE, "d": DONE, "e": DONE}
    found = audit.ends(tasks, {"a", "b", "c", "d", "gone"}, {"a": 1, "c": 2, "e": 1})
    assert (found["tasks"], found["lost"], found["not_asked_for"]) == (5, 2, 1)
    assert (found["finished_once"], found["finished_again"]) == (1, 1)
    assert found["statuses"] == {"succeeded": 4, "waiting": 1}


@pytest.mark.parametrize(
    ("task", "attempts", "wrong"),
    [
        (DONE, [BILLED], set()),
        (DONE, [BILLED, (2, *BILLED[1:])], {"billed_twice", "sums_wrong"}),
        (DONE, [(1, "settled", "ServerError", 500, 0, "final", 0)],
         {"answered_unbilled", "sums_wrong"}),
        (DONE, [], {"answered_unbilled", "sums_wrong"}),
        (DONE, [(1, "sent", "", None, 5, "estimated", 0)], {"left_open", "answered_unbilled"}),
        (("a", "succeeded", 2, 8, "estimated", None, "", "echo", "chat"),
         [UNKNOWN, (2, *BILLED[1:])], set()),
        (("a", "succeeded", 2, 8, "estimated", None, "", "echo", "chat"),
         [UNKNOWN, (3, *BILLED[1:])], {"sums_wrong"}),
        # Turns of an agent are numbered and billed each by itself.
        (TURNS, [BILLED, (*BILLED[:-1], 2)], set()),
        (TURNS, [BILLED, (2, *BILLED[1:])], {"billed_twice"}),
        (TURNS, [BILLED, (2, *BILLED[1:-1], 2)], {"sums_wrong"}),
        (("a", "succeeded", 0, None, "", None, "", "look_up@1", "tool"), [], set()),
        (DIED, [(n, *UNKNOWN[1:]) for n in range(1, 6)], set()),
        (DIED, [(n, *UNKNOWN[1:]) for n in range(1, 5)], {"failed_early", "sums_wrong"}),
        (DIED, [BILLED, *((n, *UNKNOWN[1:]) for n in range(2, 6))], {"failed_early", "sums_wrong"}),
    ],
)  # fmt: skip
def test_bills(task, attempts, wrong):
    found = audit.bills({"a": task}, {"a": attempts})
    names = {"billed_twice", "answered_unbilled", "failed_early", "left_open", "sums_wrong"}
    assert {name for name in names if found[name]} == wrong


@pytest.mark.parametrize(
    ("attempts", "seen", "wrong"),
    [
        ([BILLED], SEEN, set()),
        ([UNKNOWN, (2, *BILLED[1:])], {**SEEN, "calls": 2, "answered": 2}, {"answered_again"}),
        ([UNKNOWN, (2, *BILLED[1:])], SEEN, set()),
        ([BILLED], {**SEEN, "calls": 2, "answered": 2},
         {"answered_again", "answers_unaccounted", "calls_without_attempt"}),
        ([BILLED], {**SEEN, "overlaps": 1}, {"overlaps"}),
        ([BILLED, (2, *BILLED[1:])], SEEN, {"attempts_without_call"}),
    ],
)  # fmt: skip
def test_calls(attempts, seen, wrong):
    found = audit.calls({"a": DONE}, {"a": attempts}, {"a": seen})
    names = {"answered_again", "answers_unaccounted", "calls_without_attempt", "overlaps",
             "attempts_without_call"}  # fmt: skip
    assert {name for name in names if found[name]} == wrong
    assert found["vendor_only"] == 0
    assert audit.calls({}, {}, {"a": seen})["vendor_only"] == 1


@pytest.mark.parametrize(
    ("call", "times", "wrong"),
    [
        (("k", "charge@1", "done", 5), [4], set()),
        (("k", "charge@1", "done", 5), [3, 4], {"ran_again", "ran_twice"}),
        (("k", "charge@1", "failed", 5), [6], {"ran_when_done"}),
        (("k", "charge@1", "failed", 5), [], set()),
        (("k", "post@1", "succeeded", 5), [], {"never_ran"}),
        (("k", "mail@1", "succeeded", 5), [3, 4], {"ran_again"}),
        (("k", "mail@1", "running", None), [3], set()),
        (("other", "mail@1", "running", None), [3], {"unasked"}),
    ],
)
def test_tools_that_ran(call, times, wrong):
    found = agents.tools({"k": times} if times else {}, [call])
    assert {name for name, count in found.items() if count} - {"runs", "calls"} == wrong


def test_each_kind_of_run_is_made():
    bodies = [runs.body(number) for number in range(len(runs.RUNS))]
    assert [body["metadata"]["run"] for body in bodies] == list(runs.RUNS)
    assert len({json.dumps(body) for body in bodies}) == len(bodies)


def test_everything_is_a_victim():
    names = ["web", "dispatcher", "beat"]
    order = victims(names, 12, seed=1)
    assert order[:3] == names
    assert set(order[3:]) == set(names)
    bursts = Bursts(kills.SHORT, seed=1)
    assert not bursts.may_send(0)
    bursts.begun = kills.SHORT.kills
    assert not bursts.is_sent(range(kills.SHORT.tasks - 1))
    assert bursts.is_sent(range(kills.SHORT.tasks))
    assert bursts.may_send(kills.SHORT.tasks - 1)


def test_what_moves_is_waited_for():
    steps = iter(range(10))
    assert submit.while_moving(lambda: next(steps) == 9, lambda: next(steps), 0.0, 0.0)
    assert not submit.while_moving(lambda: False, lambda: 1, 0.01, 0.001)


def run(monkeypatch, tmp_path, name, figures):
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/x")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setattr(machine, "facts", lambda url: {"date": "today"})
    monkeypatch.setattr(chaos.processes, "raise_on_signals", lambda: None)
    monkeypatch.setattr(chaos, "PROOFS", {"made-up": "a proof"})
    proof = SimpleNamespace(
        run=lambda clusters, is_short: figures,
        CONDITIONS={"lost = 0": lambda found: found["lost"] == 0},
        COLUMNS={"lost": "lost"},
        rows=lambda found: [found],
    )
    monkeypatch.setattr(chaos, "importlib", SimpleNamespace(import_module=lambda name: proof))
    monkeypatch.setattr("sys.argv", ["chaos", name, "--short", "--out", str(tmp_path)])
    return chaos.main()


@pytest.mark.parametrize(("lost", "code"), [(0, 0), (1, 1)])
def test_a_condition_that_does_not_hold_fails(monkeypatch, tmp_path, capsys, lost, code):
    assert run(monkeypatch, tmp_path, "made-up", {"lost": lost}) == code
    found = json.loads((tmp_path / "chaos-made-up.json").read_text())
    assert found["conditions"] == {"lost = 0": not lost}
    assert (found["short"], found["lost"], found["date"]) == (True, lost, "today")
    assert ("FAILED  lost = 0" in capsys.readouterr().out) is bool(lost)


def test_a_proof_that_lacks_what_it_needs_shows_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(traces, "DATA", tmp_path / "nothing" / "is" / "here")
    monkeypatch.setattr("sys.argv", ["chaos", "traces", "--out", str(tmp_path)])
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/x")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setattr(machine, "facts", lambda url: {})
    monkeypatch.setattr(chaos.processes, "raise_on_signals", lambda: None)
    assert chaos.main() == 1
    assert "traces was NOT RUN: no traces" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_an_unknown_proof_is_told(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "nope", {})
    assert "no such proof: nope" in capsys.readouterr().err

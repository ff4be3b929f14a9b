import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import headwater.grading.pool as pool_module
from headwater.grading.pool import GraderPool
from headwater.types import Message, Problem, Verdict

TOYS = Path(__file__).with_name("toy_graders.py")
PROBLEM = Problem((Message("user", "What?"),), "ok", {"solution": "right", "kept": [1, {"a": None}]})


@pytest.fixture(scope="module")
def toys() -> Iterator[GraderPool]:
    with GraderPool(f"{TOYS}:grade", workers=2, timeout_s=1.5, memory_mb=128) as pool:
        yield pool


def grade_texts(pool: GraderPool, *texts: str) -> list[Verdict]:
    return pool.grade([(PROBLEM, text) for text in texts])


def children() -> list[psutil.Process]:
    return [c for c in psutil.Process().children(recursive=True) if "headwater.grading.child" in " ".join(c.cmdline())]


def lost(reason: str) -> Verdict:
    return Verdict(False, False, reason, 0.0)  # type: ignore[arg-type] -- any string here


def test_verdicts_keep_the_order_of_the_items(toys: GraderPool) -> None:
    texts = ["x" * random.Random(0).randrange(9) if i % 3 else "ok" for i in range(1000)]
    verdicts = grade_texts(toys, *texts)
    assert [v.style for v in verdicts] == [str(len(t)) for t in texts]
    assert [v.correct for v in verdicts] == [t == "ok" for t in texts]
    assert toys.grade([]) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("memory", "memory"),
        ("eat", "memory"),
        ("exit", "error"),
        ("segfault", "error"),
        ("killed", "memory"),
        ("sysexit", "error"),
        ("raise", "error"),
        ("recurse", "error"),
        ("forge", "error"),
        ("nan", "error"),
    ],
)
def test_a_failing_grader_costs_its_own_item_only(toys: GraderPool, text: str, reason: str) -> None:
    verdicts = grade_texts(toys, *["ok"] * 7, text, *["ok"] * 30, text, "no")
    assert [i for i, v in enumerate(verdicts) if v.correct] == [*range(7), *range(8, 38)]
    assert verdicts[7] == verdicts[38] == lost(reason)
    assert verdicts[39].reason == "wrong"


@pytest.mark.parametrize("text", ["loop", "sleep"])
def test_a_timeout_costs_its_own_item_only(toys: GraderPool, text: str) -> None:
    start = time.monotonic()
    verdicts = grade_texts(toys, "ok", text, *["ok"] * 60)
    # On a busy machine a loop has its 1.5 s of a processor first, at most ten times as long by the clock.
    assert time.monotonic() - start < 20
    assert verdicts[1] == lost("timeout")
    assert sum(v.correct for v in verdicts) == 61


def test_what_a_failing_grader_said_is_kept(toys: GraderPool) -> None:
    before = toys.counts["error"]
    grade_texts(toys, "raise", "ok")
    assert toys.counts["error"] == before + 1
    assert toys.last_error == "RuntimeError: no such luck"


def test_noise_and_standard_input_do_not_touch_the_protocol(toys: GraderPool) -> None:
    verdicts = grade_texts(toys, "print", "stdin", "ok")
    assert [v.reason for v in verdicts] == ["wrong", "wrong", "correct"]
    assert verdicts[1].score == 0


@pytest.mark.parametrize(
    "text",
    [
        "\ud800",
        "\ud83d\ude00",
        "a\x00b",
        "\n\r\x85\u2028\x1c",
        "".join(map(chr, range(0x250))),
        "é" * 1_000_000,
        '"}],[',
        "",
    ],
    ids=lambda t: ascii(t[:6]),
)
def test_any_text_arrives_as_it_was_sent(toys: GraderPool, text: str) -> None:
    problem = Problem((Message("user", text),), text, {"column": text})
    (verdict,) = toys.grade([(problem, text)])
    assert verdict == Verdict(True, True, "correct", 1.0, str(len(text)))


def test_hash_order_is_the_same_in_every_child_and_torch_is_not_imported(toys: GraderPool) -> None:
    styles = {v.style for v in grade_texts(toys, *["hash", "exit"] * 3) if v.style}
    assert len(styles) == 1
    assert not grade_texts(toys, "torch")[0].correct


def test_columns_that_are_not_json_are_refused(toys: GraderPool) -> None:
    with pytest.raises(ValueError, match=r"columns are \['when'\]"):
        toys.grade([(Problem((), None, {"when": {1, 2}}), "x")])
    assert grade_texts(toys, "ok")[0].correct


def test_children_are_kept_between_calls_and_gone_after_close() -> None:
    start = {c.pid for c in children()}
    with GraderPool(f"{TOYS}:grade", workers=2, timeout_s=0.5) as pool:
        grade_texts(pool, *["ok"] * 100)
        first = {c.pid for c in children()} - start
        grade_texts(pool, *["ok"] * 100)
        assert {c.pid for c in children()} - start == first
        assert len(first) == 2
        grade_texts(pool, "grandchild")
        assert not any(p.name() == "sleep" for p in psutil.Process().children(recursive=True))
    assert {c.pid for c in children()} == start
    assert not any(p.info["cmdline"] == ["sleep", "1000"] for p in psutil.process_iter(["cmdline"]))


def test_a_child_that_dies_idle_costs_nothing() -> None:
    with GraderPool(f"{TOYS}:grade", workers=1) as pool:
        grade_texts(pool, "ok")
        process = pool._workers[0].process
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert grade_texts(pool, "ok")[0].correct


def test_children_die_with_their_parent() -> None:
    script = f"""
        import sys, threading, time
        from headwater.grading.pool import GraderPool
        from headwater.types import Problem
        pool = GraderPool({f"{TOYS}:grade"!r}, workers=2, timeout_s=100).__enter__()
        pool.grade([(Problem(()), "ok")] * 100)
        print(*(w.process.pid for w in pool._workers), flush=True)
        pool.grade([(Problem(()), "loop")] * 2)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_trl_functions_plug_in_unchanged() -> None:
    with GraderPool(f"trl:{TOYS}:trl_messages", workers=1) as pool:
        verdicts = grade_texts(pool, "right", "left", "?")
    assert verdicts == [
        Verdict(True, True, "correct", 1.0),
        Verdict(False, True, "wrong", 0.0),
        Verdict(False, False, "unparsed", 0.0),
    ]
    with GraderPool(f"trl:{TOYS}:trl_async", workers=1) as pool:
        assert [v.score for v in grade_texts(pool, "ok", "no")] == [1.0, 0.0]
    with GraderPool(f"trl-text:{TOYS}:trl_strings", workers=1) as pool:
        verdicts = grade_texts(pool, "aa", "aaaa", "a" * 8)
    assert [(v.score, v.correct, v.reason) for v in verdicts] == [
        (0.5, False, "partial"),
        (1.0, True, "correct"),
        (2.0, True, "correct"),
    ]


def test_graders_may_return_bools_and_numbers_and_nothing_else() -> None:
    with GraderPool(f"{TOYS}:as_bool", workers=1) as pool:
        assert [v.correct for v in grade_texts(pool, "ok", "no")] == [True, False]
    with GraderPool(f"{TOYS}:as_number", workers=1) as pool:
        reasons = [v.reason for v in grade_texts(pool, "1", "0.5", "-1", "inf", "x")]
        assert reasons == ["correct", "partial", "wrong", "error", "error"]
    with GraderPool(f"{TOYS}:as_string", workers=1) as pool:
        assert grade_texts(pool, "x")[0] == lost("error")
        assert "not str" in pool.last_error


def test_the_answer_arrives_and_is_cut_to_what_a_record_can_hold() -> None:
    texts = ["7", "", "\ud800\n", "x" * 10**6]
    with GraderPool(f"{TOYS}:echo", workers=1) as pool:
        assert [v.answer for v in grade_texts(pool, *texts)] == ["7", "", "\ud800\n", "x" * 1000]


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        ("no_such_package.x:grade", "no_such_package.x:grade.*ModuleNotFoundError: No module named 'no_such_package'"),
        ("headwater.types:nothing", "headwater.types:nothing.*has no attribute 'nothing'"),
        ("nowhere.py:grade", "no file nowhere.py"),
        ("headwater.types", "does not name a grader"),
        ("trl:headwater.types", "does not name a grader"),
    ],
)
def test_a_grader_that_cannot_be_loaded_is_an_error_at_the_start(grader: str, message: str) -> None:
    with pytest.raises(ValueError, match=message), GraderPool(grader, workers=1):
        pytest.fail("the pool started")


def test_a_grader_that_ends_its_process_while_loading_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "quits.py"
    file.write_text("import os\nos._exit(7)\n")
    with pytest.raises(ValueError, match="status 7"), GraderPool(f"{file}:grade", workers=1):
        pytest.fail("the pool started")


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="workers >= 1"):
        GraderPool("a:b", workers=0)


def test_two_thousand_verdicts_take_less_than_a_second_or_so() -> None:
    with GraderPool(f"{TOYS}:grade", workers=2) as pool:
        grade_texts(pool, *["ok"] * 100)
        start = time.perf_counter()
        grade_texts(pool, *["ok"] * 4000)
        assert 4000 / (time.perf_counter() - start) > 1000  # Alone on two cores about 20,000; the margin is for CI.


def test_a_busy_machine_does_not_turn_work_into_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    true_clock = pool_module._processor_seconds
    patience = pool_module._PATIENCE
    with GraderPool(f"{TOYS}:grade", workers=1, timeout_s=0.3) as pool:
        items = [(Problem(()), "work a second")]
        assert pool.grade(items)[0].reason == "timeout"
        monkeypatch.setattr(pool_module, "_processor_seconds", lambda pid: true_clock(pid) / 6)
        monkeypatch.setattr(pool_module, "_PATIENCE", 200)
        assert pool.grade(items)[0].correct
        monkeypatch.setattr(pool_module, "_PATIENCE", patience)
        # Whoever sleeps is not kept from working, and patience has an end.
        started = time.monotonic()
        assert pool.grade([(Problem(()), "sleep")])[0].reason == "timeout"
        assert time.monotonic() - started < 10
        monkeypatch.setattr(pool_module, "_processor_seconds", lambda pid: 0.0)
        started = time.monotonic()
        assert pool.grade([(Problem(()), "loop")])[0].reason == "timeout"
        assert time.monotonic() - started >= 3.0

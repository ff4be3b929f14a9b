import json
import time

import pytest

from headwater.ledger import Ledger
from headwater.meter import Meter, total


def test_a_reveal_counts_once_however_often_it_is_repeated(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.reveal(0, ["a", "b", "a"])
    ledger.reveal(1, ["a", "c"])
    ledger.reveal(0, ["a", "b"])
    ledger.reveal(2, [])
    for book in (ledger, Ledger(path)):
        assert (book.revealed, book.problems) == (4, {"a", "b", "c"})
        assert [book.labels(step) for step in (-1, 0, 1, 9)] == [0, 2, 3, 3]
    again = Ledger(path)
    again.reveal(1, ["c", "a"])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": s, "problem": p} for s, p in [(0, "a"), (0, "b"), (1, "a"), (1, "c")]
    ]


def test_a_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).reveal(0, ["a", "b"])
    whole = path.read_text()
    for cut in range(1, len('{"step": 1, "problem": "c"}') + 1):
        path.write_text(whole + '{"step": 1, "problem": "c"}'[:cut])
        ledger = Ledger(path)
        assert (ledger.revealed, path.read_text()) == (2, whole)
    ledger.reveal(1, ["c"])
    assert (Ledger(path).revealed, len(path.read_text().splitlines())) == (3, 3)


def test_a_rank_that_does_not_write_counts_all_the_same(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).reveal(0, ["a"])
    before = path.read_text() + '{"st'
    path.write_text(before)
    reader = Ledger(path, writes=False)
    reader.reveal(1, ["b"])
    assert (reader.revealed, path.read_text()) == (2, before)


def test_meter_counts_tokens_and_flops_by_role():
    meter = Meter()
    meter.add("trained", 10, 100)
    meter.add("trained", 5, 100)
    meter.add("sampled", 7, 3)
    meter.add("graded", 4, 50)
    state = meter.state()
    assert state["trained"] == {"tokens": 15, "flops": 6 * 15 * 100, "seconds": 0.0}
    assert state["sampled"]["flops"] == 2 * 7 * 3 and state["graded"] == {"tokens": 4, "flops": 0, "seconds": 0.0}


def test_nested_blocks_give_each_second_to_the_innermost_role(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter()
    with meter.timed("trained"):
        now[0] += 1
        with meter.timed("scored"):
            now[0] += 10
            with meter.timed("graded"):
                now[0] += 100
            now[0] += 20
        now[0] += 2
        with pytest.raises(KeyError), meter.timed("scored"):
            now[0] += 1000
            raise KeyError
        now[0] += 4
    with meter.timed("trained"):
        now[0] += 10_000
    seconds = {role: row["seconds"] for role, row in meter.state().items()}
    assert seconds == {"trained": 10_007, "scored": 1030, "graded": 100} and sum(seconds.values()) == now[0]


def test_meter_goes_on_from_its_state():
    meter, other = Meter(), Meter()
    meter.add("trained", 10, 100)
    state = meter.state()
    meter.add("trained", 1, 100)
    assert state["trained"]["tokens"] == 10  # a copy
    other.restore(json.loads(json.dumps(state)))
    other.add("trained", 1, 100)
    assert other.state() == meter.state()
    assert total([meter.state(), other.state(), {}]) == {"tokens": {"trained": 22}, "flops": 13_200, "seconds": 0.0}

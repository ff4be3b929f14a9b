import json
import time

import pytest

from headwater.flops import Shape, Work
from headwater.ledger import Ledger
from headwater.meter import Meter, difference, total

SHAPE = Shape(layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1, mlp=0, vocab=3)


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
    """Width 1 and no MLP: 4 multiply-adds a token in the layer, 2 a pair, 3 for logits."""
    meter = Meter()
    meter.add("trained", SHAPE, [(2, 1), (1, 1)], Work(6, 18, 2), projections=4)
    meter.add("sampled", SHAPE, [(2, 3)])
    meter.add("prefilled", SHAPE, [(2, 0)])
    meter.add("graded", SHAPE, [(2, 3)])
    meter.add("discarded", SHAPE, [(2, 3)])
    state = meter.state()
    assert state["trained"] == {
        "tokens": 5,
        "flops": 6 * (4 * 5 + 2 * (6 + 3) + 3 * 2),
        "seconds": 0.0,
        "executed_flops": 6 * (4 * 6 + 2 * 18) + 8 * 3 * 2,
        "padding": 1,
    }
    # Two of the three tokens are read again, at positions 3 and 4.
    assert (state["sampled"]["tokens"], state["sampled"]["flops"]) == (3, 2 * (4 * 2 + 2 * 7 + 3 * 3))
    assert (state["prefilled"]["tokens"], state["prefilled"]["flops"]) == (2, 2 * (4 * 2 + 2 * 3))
    assert state["graded"]["tokens"] == 3 and state["graded"]["flops"] == 0
    assert meter.tokens == 10 and meter.flops == sum(state[r]["flops"] for r in ("trained", "sampled", "prefilled"))
    whole = total([state])
    assert whole["tokens"] == {"trained": 5, "sampled": 3, "prefilled": 2} and whole["flops"] == meter.flops
    assert whole["wasted"]["discarded"]["flops"] == state["sampled"]["flops"]


def test_lost_work_is_booked_apart():
    meter = Meter()
    meter.add("trained", SHAPE, [(2, 1)])
    before = meter.state()
    meter.add("trained", SHAPE, [(2, 1)])
    meter.add("graded", SHAPE, [(2, 1)])
    lost = difference(meter.state(), before)
    other = Meter()
    other.restore(before)
    for _ in range(2):  # booking is not adding
        other.lose([lost, lost])
    assert other.state()["lost"]["tokens"] == 6 and other.tokens == 3
    assert total([other.state()])["flops"] == before["trained"]["flops"]
    assert total([other.state()])["wasted"]["lost"]["flops"] == 2 * before["trained"]["flops"]


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
    meter.add("trained", SHAPE, [(5, 5)])
    state = meter.state()
    meter.add("trained", SHAPE, [(0, 1)])
    assert state["trained"]["tokens"] == 10  # a copy
    other.restore(json.loads(json.dumps(state)))
    other.add("trained", SHAPE, [(0, 1)])
    assert other.state() == meter.state()
    both = total([meter.state(), other.state(), {}])
    assert both["tokens"] == {"trained": 22} and both["flops"] == 2 * meter.flops
    old = {"trained": {"tokens": 1, "flops": 2.0, "seconds": 3.0}}  # of a run before executed FLOPs were counted
    assert total([old])["executed_flops"] == 0 and total([old])["flops"] == 2

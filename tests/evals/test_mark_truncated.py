from dataclasses import replace

from headwater.evals.evaluate import mark_truncated
from headwater.types import Rollout, Verdict


def test_only_what_was_cut_and_is_wrong_or_unparsed_is_truncated() -> None:
    verdicts = [
        Verdict(True, True, "correct", 1.0, answer="5"),
        Verdict(False, True, "wrong", 0.0, answer="4"),
        Verdict(False, False, "unparsed", 0.0),
        Verdict(False, True, "partial", 0.5),
        Verdict(False, False, "timeout", 0.0),
    ]
    cut = [Rollout("p", i, [1], [2], [0.0], "5", False, 0) for i in range(5)]
    assert [v.reason for v in mark_truncated(verdicts, cut)] == [
        "correct",
        "truncated",
        "truncated",
        "partial",
        "timeout",
    ]
    assert [
        replace(v, reason=w.reason) for v, w in zip(mark_truncated(verdicts, cut), verdicts, strict=True)
    ] == verdicts
    assert mark_truncated(verdicts, [replace(r, finished=True) for r in cut]) == verdicts

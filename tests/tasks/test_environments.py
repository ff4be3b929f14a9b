"""Real `verifiers` tasksets, written here, from problems to verdicts of grading children and a step of GRPO."""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from headwater.config import GRPO
from headwater.grading.pool import GraderPool
from headwater.run import StageRun
from headwater.tasks import load_task
from headwater.types import Message

needs_extra = pytest.mark.skipif(find_spec("verifiers") is None, reason="needs the extra 'environments'")
SUMS = """
import asyncio

import verifiers.v1 as vf

__all__ = ["Sums"]


class Data(vf.TaskData):
    answer: str
    a: int


class OneSum(vf.Task[Data]):
    @vf.reward(weight=0.7)
    async def right(self, trace):
        await asyncio.sleep(0)
        if trace.last_reply == "hang":
            await asyncio.sleep(1000)
        if trace.last_reply == "raise":
            raise RuntimeError("no such luck")
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.2)
    async def short(self, trace):
        if trace.last_reply == "nan":
            return float("nan")
        return {"short": len(trace.last_reply) < 5, "odd": -2.0 * (trace.last_reply == "odd")}

    @vf.reward(weight=0.1)
    async def asked(self, task, trace):
        roles = [m.role for m in trace.messages]
        return float(roles == ["system", "user", "assistant"] and str(task.a) in trace.messages[1].content)


class Config(vf.TasksetConfig):
    first: int = 0
    count: int = 40


class Sums(vf.Taskset[OneSum, Config]):
    def load(self):
        for a in range(self.config.first, self.config.first + self.config.count):
            yield OneSum(Data(prompt=f"{a}+1=", system_prompt="Add.", answer=str(a + 1), a=a), self.config.task)
"""
FEW_SHOT = [("user", "1+1="), ("assistant", "2"), ("user", "2+2=")]
CHANGES = {  # what is put into the task or taskset, and what the refusal says
    "tools": ("    @classmethod\n    def toolsets(cls, config):\n        return [object()]", "needs tools"),
    "setup": ("    async def setup(self, trace, runtime):\n        pass", "needs a runtime"),
    "runtime": ("    @vf.reward\n    async def ran(self, trace, runtime):\n        return 1.0", "needs a runtime"),
    "container": ("    NEEDS_CONTAINER = True", "needs a container"),
    "intercept": ("    @vf.intercept\n    def look(self, request: vf.Request):\n        pass", "needs to rewrite"),
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes an environment that this process and grading children can import."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        "headwater.grading.pool._START_S", 300.0
    )  # a child imports for seconds, longer beside other work

    def write(name: str, text: str) -> dict[str, object]:
        (tmp_path / f"{name}.py").write_text(text)
        return {"name": "verifiers", "environment": name}

    return write


@needs_extra
def test_problems_splits_and_verdicts(write):
    """Weights .7, .2 and .1 of right, short and asked; one asynchronous function waits, one gives two scores."""
    spec = write("some_sums", SUMS) | {"args": {"count": 60}, "test_args": {"first": 50, "count": 20}}
    task = load_task(spec | {"sizes": {"train": 8}})
    test, train = task.problems("test"), task.problems("train")
    assert task.name == "verifiers:some_sums" and len(train) == 8
    assert {p.columns["task"]["a"] for p in test} == set(range(50, 70))
    assert all(p.columns["task"]["a"] < 50 for p in [*train, *task.problems("tuning")])
    assert task.counts == {"rows": 80, "duplicates": 0, "contradictions": 0, "in_test": 10}  # pyright: ignore -- a SplitTask
    five = next(p for p in test if p.columns["task"]["a"] == 55)
    assert five.messages == (Message("system", "Add."), Message("user", "55+1=")) and five.answer == "56"
    texts = ["56", "57", "fifty-seven", "odd", "raise", "nan", "hang", " 56 "]
    with GraderPool(task.grader, workers=1, timeout_s=20.0, memory_mb=2048) as pool:
        pool.grade([(five, "56")])  # the environment itself is imported
        pool.timeout_s = 2.0
        found = pool.grade([(five, text) for text in texts])
        assert [round(v.score, 9) for v in found] == [1.0, 0.3, 0.1, -0.1, 0, 0, 0, 1.0]
        reasons = ["correct", "partial", "partial", "wrong", "error", "error", "timeout", "correct"]
        assert [v.reason for v in found] == reasons and found[0].correct and not found[1].correct
    heavier = load_task(spec | {"args": {"task": {"rewards": {"right": {"weight": 2.0}}}}})
    with GraderPool(heavier.grader, workers=1, timeout_s=20.0) as pool:
        assert pool.grade([(heavier.problems("test")[0], str(heavier.problems("test")[0].answer))])[0].score == 2.3


@needs_extra
def test_conversations_and_endless_tasksets(write):
    turns = ", ".join(f"vf.{role.title()}Message(content={text!r})" for role, text in FEW_SHOT)
    endless = SUMS.replace("(vf.Taskset[OneSum, Config]):", "(vf.Taskset[OneSum, Config]):\n    INFINITE = True")
    spec = write("few_shot", endless.replace('f"{a}+1="', f"[{turns}]"))
    with pytest.raises(ValueError, match="endless: set limit"):
        load_task(spec)
    task = load_task(spec | {"limit": 3, "fractions": {"train": 1.0}})
    (problem,) = task.problems("train")  # three tasks of one prompt
    assert problem.messages == (Message("system", "Add."), *(Message(*turn) for turn in FEW_SHOT))


@needs_extra
def test_what_is_refused(write):
    for name, (lines, words) in CHANGES.items():
        text = SUMS.replace("class OneSum(vf.Task[Data]):\n", f"class OneSum(vf.Task[Data]):\n{lines}\n\n")
        with pytest.raises(ValueError, match=f"task 0 of 'with_{name}' {words}"):
            load_task(write(f"with_{name}", text))
    judged = "class Judged(vf.TaskConfig):\n    judge: vf.JudgeConfig = vf.JudgeConfig()\n\n\nclass Config("
    cases = {
        "user": (SUMS.replace('f"{a}+1="', "None"), "needs a user who speaks first"),
        "judged": (
            SUMS.replace("class Config(", judged).replace("= 40", "= 40\n    task: Judged = Judged()"),
            "needs a judge model",
        ),
        "nothing": (re.sub(r"@vf.reward\(.*?\)", "@vf.metric", SUMS), "needs a reward"),
        "old": ("def load_environment(): pass", "defines no `__all__`.*exports a Taskset of verifiers >= 0.4"),
    }
    for name, (text, words) in cases.items():
        with pytest.raises(ValueError, match=words):
            load_task(write(f"is_{name}", text))
    spec = write("again", SUMS)
    for changes, words in (
        ({"environment": "not_there"}, "'not_there' cannot be used"),
        ({"args": {"colour": 1}}, "colour"),
        ({"limit": 0}, "has no task"),
        ({"sizes": {"train": 400}}, "its size is given as 400"),
        ({"colour": 1}, r"has no \['colour'\]"),
        ({"test_args": {}, "fractions": {"test": 0.1}}, "test_args is the whole test split"),
    ):
        with pytest.raises(ValueError, match=words):
            load_task(spec | changes)


@needs_extra
def test_a_step_of_grpo(write, make_model, tmp_path):
    from headwater.stages import grpo

    task = load_task(write("trained_sums", SUMS) | {"sizes": {"train": 4}})
    settings = GRPO.model_validate(
        {"steps": 1, "max_new_tokens": 6, "problems_per_step": 2, "group_size": 4, "optimizer": {"lr": 1e-3}}
    )
    run = StageRun(tmp_path / "run")
    with GraderPool(task.grader, workers=1, timeout_s=20.0) as pool:
        problems = task.problems("train")
        grpo.train(settings, policy=make_model(0), problems=problems, grade=pool.grade, seed=0, run=run)
        assert pool.last_error == ""
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # A random model is never right: .1 for what was asked, .2 more for completions of less than five characters.
    assert 0.1 < row["reward/mean"] < 0.3 and row["optim/grad_norm"] > 0 and row["grader/frac_error"] == 0


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    monkeypatch.delitem(sys.modules, "headwater.tasks.environments", raising=False)
    monkeypatch.delattr("headwater.tasks.environments", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'headwater\[environments\]'"):
        load_task({"name": "verifiers", "environment": "any"})

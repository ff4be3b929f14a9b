from collections.abc import Iterator

import pytest

from headwater.grading.pool import GraderPool
from headwater.tasks import load_task
from headwater.types import Problem, Verdict

SMALL = {"train": 6, "tuning": 2, "test": 2}


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool("headwater.tasks.procedural:grade", workers=1, timeout_s=20.0) as pool:
        yield pool


def problems_of(name: str, **spec) -> list[Problem]:
    task = load_task({"name": f"reasoning-gym:{name}", "sizes": SMALL, **spec})
    return [p for split in SMALL for p in task.problems(split)]


def grade(pool: GraderPool, problems: list[Problem], answers: list[str], form: str) -> list[Verdict]:
    return pool.grade([(p, form.format(a)) for p, a in zip(problems, answers, strict=True)])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("chain_sum", {"min_terms": 2, "max_terms": 3}),
        ("gsm_symbolic", {}),
        ("simple_equations", {}),
        ("letter_counting", {}),
        ("rearc", {}),  # Its scorer tells tuples from lists.
        ("binary_matrix", {}),
    ],
)
def test_golds_are_right_and_other_answers_wrong(pool: GraderPool, name: str, config: dict) -> None:
    problems = problems_of(name, config=config)
    golds = [p.answer or "" for p in problems]
    assert len({p.id for p in problems}) == 10
    assert [v.score for v in grade(pool, problems, golds, "Let me think: 7.\n<answer>{}</answer>")] == [1.0] * 10
    others = [next(a for a in golds if a != gold) for gold in golds]
    assert [v.reason for v in grade(pool, problems, others, "<answer>{}</answer>")] == ["wrong"] * 10
    assert {v.reason for v in grade(pool, problems, golds, "<answer>{}")} == {"unparsed"}


def test_an_answer_needs_no_tags_where_it_is_one_line(pool: GraderPool) -> None:
    problems = problems_of("chain_sum")
    golds = [p.answer or "" for p in problems]
    for form in ("{}", "I add.\n\n{}\n", r"so \boxed{{{}}}"):
        assert all(v.correct for v in grade(pool, problems, golds, form)), form
    assert not any(v.correct for v in grade(pool, problems, golds, "It is {} or so"))


def test_a_near_miss_scores_only_when_partial_credit_is_asked_for(pool: GraderPool) -> None:
    spec = {"name": "reasoning-gym:chain_sum", "sizes": SMALL}
    problem = load_task(spec).problems("train")[0]
    near = f"<answer>{problem.answer} apples</answer>"
    assert pool.grade([(problem, near)]) == [Verdict(False, True, "wrong", 0.0, answer=f"{problem.answer} apples")]
    task = load_task({**spec, "partial_credit": True})
    with GraderPool(task.grader, workers=1, timeout_s=20.0) as partial:
        verdict, full = partial.grade([(problem, near), (problem, problem.answer or "")])
    assert verdict.reason == "partial" and not verdict.correct and 0 < verdict.score < 1
    assert full == Verdict(True, True, "correct", 1.0, answer=problem.answer)


def test_neighbouring_seeds_repeat_prompts_but_never_across_splits() -> None:
    spec = {"name": "reasoning-gym:chain_sum", "sizes": {"train": 60, "tuning": 20, "test": 30, "unlabelled": 20}}
    one, two = (load_task({**spec, "seed": seed}) for seed in (42, 43))
    ids = [{s: {p.id for p in task.problems(s)} for s in spec["sizes"]} for task in (one, two)]
    for split in spec["sizes"]:
        assert len(ids[0][split]) == spec["sizes"][split]
        assert len(ids[0][split] & ids[1][split]) >= spec["sizes"][split] - 3
        assert not any(ids[0][split] & ids[1][other] for other in spec["sizes"] if other != split)
    assert all(p.answer is None for p in one.problems("unlabelled"))


def test_a_larger_size_only_appends() -> None:
    small, large = (
        load_task({"name": "reasoning-gym:chain_sum", "sizes": {"train": n, "tuning": 0, "test": 0}}).problems("train")
        for n in (10, 30)
    )
    assert large[:10] == small


def test_template_and_system_wrap_the_question() -> None:
    problem = problems_of("chain_sum", system="S", template="{prompt} Go.")[0]
    assert [m.role for m in problem.messages] == ["system", "user"]
    assert problem.messages[1].content.endswith(" Go.") and problem.answer is not None


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("chain_summ", {}, "no data set 'chain_summ'; it has .*chain_sum"),
        ("chain_sum", {"config": {"terms": 2}}, "refuses the config"),
        ("chain_sum", {"config": {"min_terms": 5, "max_terms": 2}}, "refuses the config"),
        ("chain_sum", {"split": 2}, r"has no \['split'\]"),
        ("chain_sum", {"sizes": {"dev": 2}}, "sizes are those of"),
        (
            "chain_sum",
            {"config": {"max_terms": 2, "max_digits": 1}, "sizes": {"train": 300, "tuning": 0, "test": 0}},
            "distinct problems",
        ),
        ("puzzle24", {}, "does not look whether the puzzle's numbers were used"),
        ("coin_flip", {}, "prefix of the right probability"),
    ],
)
def test_what_cannot_be_drawn_is_said(name: str, spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task({"name": f"reasoning-gym:{name}", **spec})


@pytest.mark.slow
def test_every_data_set_with_golds_grades_its_own_as_right(pool: GraderPool) -> None:
    from reasoning_gym.factory import DATASETS

    from headwater.tasks.procedural import _UNSOUND, _create, _problem

    failed = []
    for name in sorted(DATASETS.keys() - _UNSOUND.keys()):
        entries = _create(name, '{"seed": 7, "size": 4}')
        problems = [_problem(name, {}, entries[i], {}) for i in range(3) if entries[i]["answer"] is not None]
        golds = [p.answer or "" for p in problems]
        failed += [name] * any(not v.correct for v in grade(pool, problems, golds, "<answer>{}</answer>"))
    assert failed == []

"""Arms to nodes: which stages and evaluations a recipe needs, each once, in an order that respects their parents."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from headwater import assets, spec
from headwater.config import (
    GRPO,
    SFT,
    ModelConfig,
    Recipe,
    arm_stages,
    needs_answers,
)
from headwater.grading.child import split_spec
from headwater.spec import REVISIONS, DecisionSpec, EvaluationSpec, ModelRef, Node, Problems, StageSpec
from headwater.study.budget import check_budget, needed
from headwater.tasks import load_task
from headwater.tasks.benchmarks import bare
from headwater.tasks.overlap import overlaps
from headwater.tasks.pool import draw_pool, part_of, pool_digest
from headwater.tasks.splits import check_disjoint
from headwater.types import Problem, Task

Part = Literal["all", "first", "second"]


@dataclass
class Graph:
    """Nodes by key in topological order; which of them each arm and model row is made of.

    `arms[variant][seed]` are the keys of the arm's stages, the last one its student. `evals[(model, evaluation, seed)]`
    is an evaluation's key, where `model` is a stage's key or the name of an untrained model. `names[key]` is the name
    of the stage or of the evaluation.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    arms: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    decisions: dict[tuple[str, int], str] = field(default_factory=dict)
    """(variant, seed) -> key of the decision that splits its labels."""
    teachers: dict[str, None] = field(default_factory=dict)
    evals: dict[tuple[str, str, int], str] = field(default_factory=dict)
    monitors: dict[int, EvaluationSpec] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    """What an offline plan could not look at."""
    requested: int = 0
    """Stages that the arms would train if nothing were shared."""

    def add(self, node: Node, name: str, title: str) -> str:
        key = spec.key(node)
        self.nodes.setdefault(key, node)
        self.names.setdefault(key, name)
        self.titles.setdefault(key, title)
        return key

    @cached_property
    def stages(self) -> list[str]:
        return [key for key, node in self.nodes.items() if isinstance(node, StageSpec)]


def plan(recipe: Recipe, *, offline: bool = False) -> Graph:
    """The graph of a recipe. Reads the task's data, no model weights; `offline` tolerates a Hub out of reach.

    Raises ValueError before anything is trained: too little data, training problems among the evaluation's, an arm over
    its budget of reveals, a missing file.
    """
    return _Planner(recipe, offline).graph


def probe_node(recipe: Recipe, arm: str) -> DecisionSpec:
    """The probe of an arm's pair on the first seed's pool, with held-out prompts where the task has some.

    Raises ValueError as `plan` does, and for an arm without a teacher.
    """
    if arm not in recipe.arms or recipe.arms[arm].teacher == "none":
        taught = [name for name, point in recipe.arms.items() if point.teacher != "none"]
        raise ValueError(f"--arm {arm!r}: choose an arm with a teacher: {taught}")
    return _Planner(recipe, False).decision(arm, recipe.pool.labels, recipe.seeds[0], compare=True)


class _Planner:
    def __init__(self, recipe: Recipe, offline: bool) -> None:
        self.recipe, self.offline, self.graph = recipe, offline, Graph()
        self._tasks: dict[str, Task | None] = {}
        self._data: dict[tuple[str, str], Sequence[Problem]] = {}
        self._held_out: dict[str, list[Problem]] = {}
        self._overlapping: dict[str, tuple[str, ...]] = {}
        self._models: dict[str, ModelRef] = {role: self._ref(model) for role, model in recipe.models.items()}
        self._check_data()
        # A matched arm needs the keys of the arm it is matched to.
        for name, variant in sorted(recipe.variants.items(), key=lambda item: self._is_matched(item[1].arm)):
            check_budget(recipe, name)
            for seed in recipe.seeds:
                self.graph.arms.setdefault(name, {})[seed] = self._arm(name, variant.arm, variant.labels, seed)
        self.graph.arms = {name: self.graph.arms[name] for name in recipe.variants}
        self._evaluations()

    def _is_matched(self, arm: str) -> bool:
        return self.recipe.arms[arm].match_flops is not None

    def _arm(self, variant: str, name: str, labels: int, seed: int) -> list[str]:
        stages: list[str] = []
        arm = self.recipe.arms[name]
        upstream: Part = "all" if arm.share is None else "first"
        finish: Part = {"fresh": "second", "replay": "first"}.get(arm.finish, "all")  # pyright: ignore -- all three are parts
        student, teacher = self._models["student"], self._models.get(arm.teacher_model)
        at = f", {labels} labels" if self.recipe.pool.budgets else ""
        decision = None
        if arm.share == "auto":
            decision = self.graph.add(self.decision(name, labels, seed), "probe", f"probe, seed {seed}{at}")
            self.graph.decisions[variant, seed] = decision
        for stage in arm_stages(arm):
            settings = self.recipe.settings(name, stage)
            of_teacher = stage in ("teacher_rl", "teacher_sft")
            start = teacher if of_teacher else student
            assert start is not None
            labelled = needs_answers(settings)
            dense = not of_teacher and stage != "student_rl"
            solutions = isinstance(settings, SFT) and settings.tokens == "solutions"
            taught = dense and arm.teacher != "none" and not solutions
            node = StageSpec(
                settings=settings,
                revision=REVISIONS[settings.method],
                seed=seed,
                start=start,
                teacher=teacher if taught else None,
                problems=self._pool(
                    labels,
                    seed,
                    finish if stage == "student_rl" else upstream,
                    arm.share,
                    labelled=labelled,
                    dense=dense,
                    unlabelled=dense and arm.prompts == "unlabelled",
                ),
                grader=self._grader(self.recipe.task) if labelled else None,
                grader_digest=_code(self._grader(self.recipe.task)) if labelled else None,
                match=self._matched(arm.match_flops, labels, seed),
                decision=decision,
            )
            key = self.graph.add(node, stage, f"{stage}, seed {seed}{at}")
            self.graph.requested += 1
            stages.append(key)
            if of_teacher:
                teacher = start.model_copy(update={"stage": key})
                self.graph.teachers[key] = None
            else:
                student = start.model_copy(update={"stage": key})
        return stages

    def _matched(self, arm: str | None, labels: int, seed: int) -> tuple[str, ...]:
        if arm is None:
            return ()
        variant = f"{arm}@{labels}" if self.recipe.pool.budgets else arm
        decided = self.graph.decisions.get((variant, seed))
        return (*self.graph.arms[variant][seed], *([decided] if decided else []))

    def decision(self, name: str, labels: int, seed: int, *, compare: bool = False) -> DecisionSpec:
        """The probe of an arm's pair, which also says how to split so many labels."""
        recipe, arm = self.recipe, self.recipe.arms[name]
        settings = {stage: recipe.settings(name, stage) for stage in arm_stages(arm)}
        own = next((s for s in (settings.get("student_rl"), settings.get("teacher_rl")) if isinstance(s, GRPO)), None)
        up = [s for stage, s in settings.items() if stage != "student_rl" and arm.prompts == "pool"]
        grader = self._grader(recipe.task)
        many = min(recipe.probe.problems, labels)
        return DecisionSpec(
            settings=recipe.probe,
            revision=REVISIONS["probe"],
            seed=seed,
            start=self._models["student"],
            teacher=self._models[arm.teacher_model],
            trained=arm.teacher in ("rl", "sft"),
            problems=self._pool(many, seed, "all", None, labelled=True),
            held_out=self._unseen(many, seed) if compare else None,
            labels=labels,
            dense_prompts=recipe.pool.unlabelled if arm.prompts == "unlabelled" else None,
            least=(max((needed(s, labels) for s in up), default=1), needed(own, labels) if own else 1),
            group_size=own.group_size if own else 8,
            max_new_tokens=max(s.max_new_tokens for s in settings.values()),
            temperature=next(iter(settings.values())).temperature,
            grader=grader,
            grader_digest=_code(grader),
        )

    def _unseen(self, count: int, seed: int) -> Problems | None:
        """Prompts that no stage sees, from the first split that has so many."""
        for split in ("tuning",) if self.recipe.pool.unlabelled else ("unlabelled", "tuning"):
            with suppress(ValueError):
                return self._pool(count, seed, "all", None, labelled=False, split=split)
        return None

    def _pool(
        self,
        labels: int,
        seed: int,
        part: Part,
        share: float | Literal["auto"] | None,
        *,
        labelled: bool,
        dense: bool = False,
        unlabelled: bool = False,
        split: str = "train",
    ) -> Problems:
        split, count = ("unlabelled", self.recipe.pool.unlabelled) if unlabelled else (split, labels)
        whole = ("first", 1.0), ("second", 0.0), *([("first", 0.0)] if dense else [])
        if unlabelled or (part, share) in whole:
            part = "all"
        excluded = self._excluded(split)
        drawn = self._draw(self.recipe.task, split, count, seed, f"the {split} pool", excluded)
        known = None if part == "all" or share == "auto" else share
        problems = drawn if known is None else part_of(drawn, part, known)
        return Problems(
            task=self.recipe.task,
            split=split,
            count=count,
            seed=seed,
            part=part,
            share=0.5 if part == "all" else known,
            labelled=labelled,
            excluded=excluded,
            digest=pool_digest(problems if labelled else [p.unlabelled() for p in problems], labelled=labelled),
        )

    def _evaluations(self) -> None:
        recipe = self.recipe
        for name, settings in recipe.evaluations.items():
            spec_of_task = settings.task or recipe.task
            grader = self._grader(spec_of_task)
            problems = self._held_out[name]
            seen = Problems(
                task=spec_of_task,
                split=settings.split,
                count=settings.problems,
                seed=None,
                digest=pool_digest(problems, labelled=True),
            )
            frozen = settings.model_copy(update={"task": None})

            def node(ref: ModelRef, seed: int, seen=seen, frozen=frozen, grader=grader) -> EvaluationSpec:
                return EvaluationSpec(
                    settings=frozen,
                    revision=REVISIONS["evaluate"],
                    seed=seed,
                    start=ref,
                    problems=seen,
                    grader=grader,
                    grader_digest=_code(grader),
                )

            for seed in recipe.seeds:
                for role, ref in self._models.items():
                    self.graph.evals[role, name, seed] = self.graph.add(
                        node(ref, seed), name, f"{name} of base {role}, seed {seed}"
                    )
                for stage in self._endpoints(seed):
                    of = self.graph.nodes[stage]
                    ref = of.start.model_copy(update={"stage": stage})
                    title = f"{name} after {self.graph.titles[stage]}"
                    self.graph.evals[stage, name, seed] = self.graph.add(node(ref, seed), name, title)
            if not self.graph.monitors:
                few = min(recipe.execution.eval_problems, settings.problems)
                shown = seen.model_copy(update={"count": few, "digest": pool_digest(problems[:few], labelled=True)})
                for seed in recipe.seeds:
                    base = node(self._models["student"], seed)
                    self.graph.monitors[seed] = base.model_copy(update={"problems": shown})

    def _endpoints(self, seed: int) -> list[str]:
        """Every stage of this seed: endpoints for the arms table, the others to see where an arm gained or lost."""
        return list(dict.fromkeys(key for arm in self.graph.arms.values() for key in arm[seed]))

    def _task(self, config: dict[str, Any]) -> Task | None:
        """The task; None when planning offline and it is on the Hub and out of reach."""
        place = spec.digest(config)
        if place not in self._tasks:
            try:
                self._tasks[place] = load_task(config)
            except (ValueError, OSError) as error:
                if not (self.offline and config.get("name") == "hub"):
                    raise
                self._tasks[place] = None
                self.graph.unchecked.append(f"data of {config.get('source')}: {error}")
        return self._tasks[place]

    def _grader(self, config: dict[str, Any]) -> str:
        task = self._task(config)
        return task.grader if task else str(config.get("grader"))

    def _problems(self, config: dict[str, Any], split: str) -> Sequence[Problem]:
        place = (spec.digest(config), split)
        if place not in self._data:
            task = self._task(config)
            self._data[place] = task.problems(split) if task else []
        return self._data[place]

    def _excluded(self, split: str) -> tuple[str, ...]:
        """Ids of the pool's problems that overlap too much with one of an evaluation."""
        if self.recipe.pool.exclude_overlap is None:
            return ()
        if split not in self._overlapping:
            pool, limit = self._problems(self.recipe.task, split), self.recipe.pool.exclude_overlap
            found = [rows for held in self._held_out.values() for rows in overlaps(pool, held, limit).values()]
            self._overlapping[split] = tuple(sorted({row.train for rows in found for row in rows}))
        return self._overlapping[split]

    def _draw(
        self,
        config: dict[str, Any],
        split: str,
        count: int,
        seed: int | None,
        what: str,
        excluded: Sequence[str] = (),
    ) -> list[Problem]:
        left_out = set(excluded)
        try:
            there = [p for p in self._problems(config, split) if p.id not in left_out]
            return draw_pool(there, count, seed) if self._task(config) else []
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None

    def _check_data(self) -> None:
        recipe = self.recipe
        # A recipe without arms only measures.
        used = ["train"] if recipe.arms else []
        used += ["unlabelled"] if any(a.prompts == "unlabelled" for a in recipe.arms.values()) else []
        for name, settings in recipe.evaluations.items():
            task = settings.task or recipe.task
            held_out = self._draw(task, settings.split, settings.problems, None, f"evaluation {name!r}")
            if missing := [p.id for p in held_out if p.answer is None]:
                raise ValueError(f"evaluation {name!r}: {len(missing)} problems have no answer")
            self._held_out[name] = held_out
        for split in used:
            left_out = set(self._excluded(split))
            pool = [p for p in self._problems(recipe.task, split) if p.id not in left_out]
            for held_out in self._held_out.values():
                check_disjoint(pool, held_out)
        if recipe.pool.exclude_overlap is None:
            self._check_questions(used)

    def _check_questions(self, used: Sequence[str]) -> None:
        """ValueError when a benchmark's question is trained on in one prompt and evaluated in another."""
        for name, settings in self.recipe.evaluations.items():
            task = bare(settings.task or self.recipe.task)
            asked = self._draw(task, settings.split, settings.problems, None, f"evaluation {name!r}")
            for split in used:
                check_disjoint(self._problems(bare(self.recipe.task), split), asked)

    def _ref(self, model: ModelConfig) -> ModelRef:
        found = fingerprint(model.source, offline=self.offline)
        if model.template not in ("chat", "none"):
            found = spec.digest([found, assets.sha256_file(assets.fetch(model.template))])
        return ModelRef(config=model, fingerprint=found)


def fingerprint(source: str, *, offline: bool = False) -> str:
    """Digest of a local model's files. `hf:` and `wheel:` sources are known by their name, which pins them."""
    if source.startswith(("hf:", "wheel:")):
        return ""
    try:
        root = assets.fetch(source)
    except ValueError:
        if offline:
            return ""
        raise
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    return spec.digest([[str(p.relative_to(root)), assets.sha256_file(p)] for p in files])


def _code(grader: str) -> str | None:
    """Digest of the user's file that holds a grader; None for one of an installed package."""
    _, place, _ = split_spec(grader)
    if not place.endswith(".py"):
        return None
    if not Path(place).is_file():
        raise ValueError(f"the grader {grader!r} is in a file that does not exist: looked for {Path(place).absolute()}")
    return assets.sha256_file(Path(place))

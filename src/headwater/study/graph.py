"""Arms to nodes: which stages and evaluations a recipe needs, each once, in an order that respects their parents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from headwater import assets, spec
from headwater.arms import StageName
from headwater.config import (
    GRPO,
    SFT,
    Distill,
    ModelConfig,
    Recipe,
    TeacherRollouts,
    arm_stages,
    needs_answers,
)
from headwater.grading.child import split_spec
from headwater.spec import REVISIONS, EvaluationSpec, ModelRef, Problems, StageSpec
from headwater.tasks import load_task
from headwater.tasks.overlap import overlaps
from headwater.tasks.pool import draw_pool, half, pool_digest
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

    nodes: dict[str, StageSpec | EvaluationSpec] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    arms: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    teachers: dict[str, None] = field(default_factory=dict)
    evals: dict[tuple[str, str, int], str] = field(default_factory=dict)
    monitors: dict[int, EvaluationSpec] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    """What an offline plan could not look at."""
    requested: int = 0
    """Stages that the arms would train if nothing were shared."""

    def add(self, node: StageSpec | EvaluationSpec, name: str, title: str) -> str:
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


class _Planner:
    def __init__(self, recipe: Recipe, offline: bool) -> None:
        self.recipe, self.offline, self.graph = recipe, offline, Graph()
        self._tasks: dict[str, Task | None] = {}
        self._data: dict[tuple[str, str], Sequence[Problem]] = {}
        self._held_out: list[list[Problem]] = []
        self._overlapping: dict[str, tuple[str, ...]] = {}
        self._models: dict[str, ModelRef] = {role: self._ref(model) for role, model in recipe.models.items()}
        self._check_data()
        # A matched arm needs the keys of the arm it is matched to.
        for name, variant in sorted(recipe.variants.items(), key=lambda item: self._is_matched(item[1].arm)):
            _check_budget(recipe, name)
            for seed in recipe.seeds:
                self.graph.arms.setdefault(name, {})[seed] = self._arm(variant.arm, variant.labels, seed)
        self.graph.arms = {name: self.graph.arms[name] for name in recipe.variants}
        self._evaluations()

    def _is_matched(self, arm: str) -> bool:
        return self.recipe.arms[arm].match_flops is not None

    def _arm(self, name: str, labels: int, seed: int) -> list[str]:
        stages: list[str] = []
        arm = self.recipe.arms[name]
        upstream: Part = "first" if arm.halves else "all"
        finish: Part = {"fresh": "second", "replay": "first"}.get(arm.finish, "all")  # pyright: ignore -- all three are parts
        student, teacher = self._models["student"], self._models.get(arm.teacher_model)
        at = f", {labels} labels" if self.recipe.pool.budgets else ""
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
                    labelled=labelled,
                    unlabelled=dense and arm.prompts == "unlabelled",
                ),
                grader=self._grader(self.recipe.task) if labelled else None,
                grader_digest=_code(self._grader(self.recipe.task)) if labelled else None,
                match=self._matched(arm.match_flops, labels, seed),
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
        return tuple(self.graph.arms[f"{arm}@{labels}" if self.recipe.pool.budgets else arm][seed])

    def _pool(self, labels: int, seed: int, part: Part, *, labelled: bool, unlabelled: bool) -> Problems:
        split, count = ("unlabelled", self.recipe.pool.unlabelled) if unlabelled else ("train", labels)
        part = "all" if unlabelled else part
        excluded = self._excluded(split)
        problems = half(self._draw(self.recipe.task, split, count, seed, f"the {split} pool", excluded), part)
        return Problems(
            task=self.recipe.task,
            split=split,
            count=count,
            seed=seed,
            part=part,
            labelled=labelled,
            excluded=excluded,
            digest=pool_digest(problems if labelled else [p.unlabelled() for p in problems], labelled=labelled),
        )

    def _evaluations(self) -> None:
        recipe = self.recipe
        for name, settings in recipe.evaluations.items():
            spec_of_task = settings.task or recipe.task
            grader = self._grader(spec_of_task)
            problems = self._draw(spec_of_task, settings.split, settings.problems, None, f"evaluation {name!r}")
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
            found = [rows for held in self._held_out for rows in overlaps(pool, held, limit).values()]
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
            self._held_out.append(held_out)
            for split in used:
                check_disjoint(self._problems(recipe.task, split), held_out)

    def _ref(self, model: ModelConfig) -> ModelRef:
        found = fingerprint(model.source, offline=self.offline)
        if model.template not in ("chat", "none"):
            found = spec.digest([found, _file_digest(assets.fetch(model.template))])
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
    return spec.digest([[str(p.relative_to(root)), _file_digest(p)] for p in files])


def _code(grader: str) -> str | None:
    """Digest of the user's file that holds a grader; None for one of an installed package."""
    _, place, _ = split_spec(grader)
    if not place.endswith(".py"):
        return None
    if not Path(place).is_file():
        raise ValueError(f"the grader {grader!r} is in a file that does not exist: looked for {Path(place).absolute()}")
    return _file_digest(Path(place))


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def most_reveals(recipe: Recipe, name: str) -> int | None:
    """Upper bound of the answers that a variant of an arm reveals in a seed, counting a re-read again; None where FLOPs
    set its length."""
    variant = recipe.variants[name]
    if recipe.arms[variant.arm].match_flops is not None:
        return None
    total = 0
    for stage in arm_stages(recipe.arms[variant.arm]):
        settings = recipe.settings(variant.arm, stage)
        if settings.gate is not None and settings.gate.watch == "score":
            looks = -(-settings.steps // settings.gate.every)
            total += looks * settings.gate.held_out(_available(recipe, name, stage))
        if isinstance(settings, GRPO):
            total += settings.steps * settings.problems_per_step * (1 + settings.redraws)
        elif isinstance(settings, TeacherRollouts) and settings.keep != "all":
            total += variant.labels
        elif isinstance(settings, SFT) and settings.tokens == "solutions":
            total += settings.steps * settings.sequences_per_step
    return total


def _available(recipe: Recipe, name: str, stage: StageName) -> int:
    """Problems that a stage of a variant of an arm is given."""
    variant = recipe.variants[name]
    arm = recipe.arms[variant.arm]
    if arm.prompts == "unlabelled" and stage not in ("teacher_rl", "teacher_sft", "student_rl"):
        return recipe.pool.unlabelled
    return variant.labels // 2 if arm.halves else variant.labels


def _check_budget(recipe: Recipe, name: str) -> None:
    variant = recipe.variants[name]
    for stage in arm_stages(recipe.arms[variant.arm]):
        settings = recipe.settings(variant.arm, stage)
        available = _available(recipe, name, stage)
        held = settings.gate.held_out(available) if settings.gate else 0
        needed = settings.problems_per_step if isinstance(settings, GRPO | Distill) else 1
        if needed > available - held:
            raise ValueError(
                f"arm {name!r}: [stages.{stage}] takes {needed} problems a step, its share of the pool has "
                f"{available}{f', of which its gate holds out {held}' if held else ''}: lower problems_per_step or "
                "raise pool.labels"
            )
    limit = recipe.pool.max_reveals
    if limit is None:
        return
    reveals = most_reveals(recipe, name)
    if reveals is None or reveals > limit:
        count = "an unknown number of" if reveals is None else f"up to {reveals}"
        raise ValueError(
            f"arm {name!r} would reveal {count} answers a seed, over pool.max_reveals = {limit}: "
            "lower steps or problems_per_step, or raise the budget"
        )

"""How many problems and answers the stages of an arm may use, checked before anything is trained."""

from __future__ import annotations

from headwater.arms import StageName
from headwater.config import GRPO, SFT, Distill, MethodConfig, Recipe, TeacherRollouts, arm_stages


def most_reveals(recipe: Recipe, name: str) -> int | None:
    """Upper bound of the answers that a variant of an arm reveals in a seed, counting a re-read again; None where FLOPs
    set its length."""
    variant = recipe.variants[name]
    arm, total = recipe.arms[variant.arm], 0
    if arm.match_flops is not None:
        return None
    if arm.share == "auto":
        total += min(recipe.probe.problems, variant.labels)
    for stage in arm_stages(arm):
        settings, problems = recipe.settings(variant.arm, stage), _available(recipe, name, stage)
        if not problems:
            continue
        if settings.gate is not None and settings.gate.watch == "score":
            looks = -(-settings.steps // settings.gate.every)
            total += looks * settings.gate.held_out(problems)
        if isinstance(settings, GRPO):
            total += settings.steps * settings.problems_per_step * (1 + settings.redraws)
        elif isinstance(settings, TeacherRollouts) and settings.keep != "all":
            total += variant.labels
        elif isinstance(settings, SFT) and settings.tokens == "solutions":
            total += settings.steps * settings.sequences_per_step
    return total


def needed(settings: MethodConfig, available: int) -> int:
    """Fewest problems that a stage can be given: those of a step, and what a gate holds out of so many."""
    per_step = settings.problems_per_step if isinstance(settings, GRPO | Distill) else 1
    return per_step + (settings.gate.held_out(available) if settings.gate else 0)


def _available(recipe: Recipe, name: str, stage: StageName) -> int:
    """Problems that a stage of a variant of an arm is given, at most where a decision says how many; 0: it is not
    trained."""
    variant = recipe.variants[name]
    arm, labels = recipe.arms[variant.arm], variant.labels
    if arm.prompts == "unlabelled" and stage not in ("teacher_rl", "teacher_sft", "student_rl"):
        return recipe.pool.unlabelled
    if arm.share is None or arm.share == "auto":
        return labels
    up = int(labels * arm.share)
    if stage == "student_rl":
        return {"fresh": labels - up, "replay": up}.get(arm.finish, labels)
    return up if up or stage.startswith("teacher") else labels


def check_budget(recipe: Recipe, name: str) -> None:
    """ValueError when a step takes more problems than there are, or a variant may exceed `pool.max_reveals`."""
    variant = recipe.variants[name]
    for stage in arm_stages(recipe.arms[variant.arm]):
        settings = recipe.settings(variant.arm, stage)
        available = _available(recipe, name, stage)
        held = settings.gate.held_out(available) if settings.gate else 0
        if needed(settings, available) > available > 0:
            raise ValueError(
                f"arm {name!r}: [stages.{stage}] takes {needed(settings, available) - held} problems a step, its share "
                f"of the pool has {available}{f', of which its gate holds out {held}' if held else ''}: lower "
                "problems_per_step or raise pool.labels"
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

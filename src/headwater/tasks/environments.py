"""Tasksets of `verifiers` (github.com/PrimeIntellect-ai/verifiers, 0.4) whose tasks are one answer to one prompt."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

# Imported here, since it takes seconds, which a grading child spends before the clock of its first item starts.
import verifiers.v1 as vf  # pyright: ignore[reportMissingImports] -- an extra; `load_task` says where it is missing
from verifiers.v1.state import state_cls  # pyright: ignore[reportMissingImports] -- as above
from verifiers.v1.utils import decorators, loaders  # pyright: ignore[reportMissingImports] -- as above

from headwater.tasks import check_keys
from headwater.tasks.splits import SplitTask
from headwater.tasks.table import check_splits, divide
from headwater.types import Message, Problem

_ROLES = ("system", "user", "assistant")


def load(spec: Mapping[str, Any]) -> SplitTask:
    """The tasks of an installed taskset, split by the hash of their prompt; rewards are its own.

    `environment`: the taskset's id. `args`: settings of its config, weights of rewards among them
    (`args.task.rewards.NAME.weight`). `test_args`: settings on top of these, whose tasks are the test split and in no
    other. `limit`: how many tasks are read, which an endless taskset needs. `fractions`, `sizes`: of the splits.

    A prompt is the task's system prompt and its messages. The answer is the data's field `answer` where that is a text,
    else "". Raises ValueError for an environment that cannot be loaded or refuses its settings, and for tasks that need
    more than one answer to a prompt: tools, a user, a container or other runtime, a judge model, several agents.
    """
    title = f"verifiers:{spec.get('environment')}"
    check_keys("verifiers", spec, {"args", "test_args", "limit", "fractions", "sizes"}, {"environment"})
    check_splits(title, spec, "test_args")
    args = spec.get("args", {})
    rows = _problems(spec, args)
    tested = _problems(spec, {**args, **spec["test_args"]}) if "test_args" in spec else []
    counts = {"rows": len(rows) + len(tested)}
    return divide(title, "headwater.tasks.environments:grade", spec, (rows, tested, []), counts)


def _problems(spec: Mapping[str, Any], args: Mapping[str, Any]) -> list[Problem]:
    name, limit = str(spec["environment"]), spec.get("limit")
    try:
        taskset = loaders.load_taskset(_config(name, args))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the environment {name!r} cannot be used with args {dict(args)}: {error}; it must be an installed package "
            "that exports a Taskset of verifiers >= 0.4 (one of `SingleTurnEnv` and `Rubric` has to be ported)"
        ) from error
    if not taskset.bounded and limit is None:
        raise ValueError(f"the environment {name!r} is endless: set limit, the number of tasks to read")
    tasks = list(taskset if limit is None else taskset.take(limit))
    if not tasks:
        raise ValueError(f"the environment {name!r} has no task with args {dict(args)}")
    # Rewards are code: when it changes, so do the problems' digest and every key.
    code = hashlib.sha256(inspect.getsource(inspect.getmodule(type(tasks[0])) or type(tasks[0])).encode()).hexdigest()
    columns = {"environment": name, "args": dict(args), "code": code}
    return [_problem(task, taskset, columns) for task in tasks]


def _config(name: str, args: Mapping[str, Any]) -> Any:
    return loaders.taskset_config_type(name).model_validate({**args, "id": name})


def _problem(task: Any, taskset: Any, columns: Mapping[str, Any]) -> Problem:
    place = f"task {task.data.idx} of {columns['environment']!r}"
    if needs := [what for what, is_needed in _needs(task, taskset, columns["environment"]).items() if is_needed]:
        raise ValueError(f"{place} needs {', '.join(needs)}; single answers to a prompt, rewarded from the text, work")
    row = task.data.model_dump(mode="json")
    if type(task) is not taskset.task_type() or type(task.data).model_validate(row) != task.data:
        raise ValueError(f"{place} has data that JSON does not keep, or another type than its Taskset[...] declares")
    answer = row.get("answer")
    return Problem(_messages(task.data, place), answer if isinstance(answer, str) else "", {**columns, "task": row})


def _needs(task: Any, taskset: Any, name: str) -> dict[str, Any]:
    """What a task needs that a prompt and a completion do not have; empty or false where it does not."""
    kind, data, rewards = type(task), task.data, task.hooks("reward")
    required = [inspect.signature(reward).parameters.get("runtime") for reward in rewards]
    harnessed = loaders.environment_class(name) is not vf.SingleAgentEnv or loaders.default_harness_id(name) == name
    return {
        "several agents or a program of its own": harnessed,
        "tools": data.skills or taskset.toolsets(taskset.config) or kind.toolsets(task.config),
        "a user who speaks first": data.prompt is None,
        "a container": kind.NEEDS_CONTAINER or data.image,
        "a runtime": kind.setup is not vf.Task.setup
        or kind.finalize is not vf.Task.finalize
        or any(p is not None and p.default is p.empty for p in required),
        "to rewrite the conversation": decorators.discover_decorated(task, "intercept"),
        "a judge model": task.config.judges or any(isinstance(value, vf.JudgeConfig) for _, value in task.config),
        "a reward": not rewards,
    }


def _messages(data: Any, place: str) -> tuple[Message, ...]:
    turns = [vf.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else data.prompt
    if not turns or any(t.role not in _ROLES or not isinstance(t.content, str) for t in turns):
        raise ValueError(f"{place}: a prompt is a text, or texts of {', '.join(_ROLES)}, not {turns!r:.200}")
    system = (Message("system", data.system_prompt),) if data.system_prompt is not None else ()
    return (*system, *(Message(turn.role, turn.content) for turn in turns))


def grade(completion: str, problem: Problem) -> float:
    """The weighted sum of the task's rewards for this completion: 1 and more is fully right.

    As in `verifiers` replay, the task is made anew from its data and the taskset's config. What a reward raises is the
    caller's to report.
    """
    name, row = problem.columns["environment"], problem.columns["task"]
    kind = loaders.task_type(name)
    task = kind(kind.data_type().model_validate(row), _config(name, problem.columns["args"]).task)
    seed, agent = vf.TraceTask(type=kind.__name__, data=task.data), vf.AgentInfo(config=vf.AgentConfig())
    trace = vf.Trace(task=seed, agent=agent, state=state_cls(kind)(), is_completed=True, ok=True)
    for turn in (*problem.messages, Message("assistant", completion)):
        parent, message = len(trace.nodes) - 1 if trace.nodes else None, {"role": turn.role, "content": turn.content}
        trace.nodes.append(vf.MessageNode(parent=parent, message=message))
    trace.nodes[-1].sampled = True
    asyncio.run(task.score(trace))
    return round(trace.reward, 9)  # Weights such as 0.7, 0.2 and 0.1 add up to a little less than 1.

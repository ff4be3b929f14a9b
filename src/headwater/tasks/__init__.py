"""Problems and their graders."""

from __future__ import annotations

from collections.abc import Mapping, Set

from headwater.tasks.chains import Chains
from headwater.tasks.splits import SplitTask


def load_task(spec: Mapping[str, object]) -> Chains | SplitTask:
    """The task that a plain mapping describes; `name` says which kind, the other keys are that kind's own.

    - `chains`: the embedded world's task; `seed`, `sizes` of the splits.
    - `reasoning-gym:DATA_SET`: see `procedural.load`.
    - `gsm8k`, `math`, `math500`, `aime24`, ...: see `benchmarks.load`.
    - `jsonl`, `parquet`, `hub`: rows of a file or of a Hugging Face data set; see `table.load`.
    - `verifiers`: an environment of single answers; see `environments.load`.

    Raises ValueError for an unknown name, an unknown or missing key, and for data that cannot be read as asked.
    """
    name = spec.get("name")
    rest = {key: value for key, value in spec.items() if key != "name"}
    match str(name).partition(":"):
        case "chains", "", "":
            rest |= rest.pop("sizes", {})  # type: ignore[arg-type] -- checked by Chains
            check_keys("chains", rest, {"seed", "train", "tuning", "test", "unlabelled"})
            return Chains(**rest)  # type: ignore[arg-type] -- likewise
        case "reasoning-gym", ":", data_set if data_set:
            from headwater.tasks import procedural

            return procedural.load(data_set, rest)
        case "jsonl" | "parquet" | "hub" as kind, "", "":
            from headwater.tasks import table

            return table.load(kind, rest)
        case "verifiers", "", "":
            try:
                from headwater.tasks import environments
            except ModuleNotFoundError as error:
                if (error.name or "").split(".")[0] != "verifiers":
                    raise
                raise ValueError(
                    "this task needs the extra 'environments': pip install 'headwater[environments]'"
                ) from error
            return environments.load(rest)
    from headwater.tasks import benchmarks

    if name in benchmarks.benchmarks():
        return benchmarks.load(str(name), rest)
    raise ValueError(
        f"no task is called {name!r}; use 'chains', 'reasoning-gym:DATA_SET', 'jsonl', 'parquet', 'hub', 'verifiers' "
        f"or one of {', '.join(benchmarks.benchmarks())}"
    )


def check_keys(task: str, given: Mapping[str, object], allowed: Set[str], required: Set[str] = frozenset()) -> None:
    """Raise ValueError for keys that are unknown or missing."""
    if unknown := sorted(given.keys() - allowed - required):
        raise ValueError(f"{task} has no {unknown}; it takes {sorted(allowed | required)}")
    if missing := sorted(required - given.keys()):
        raise ValueError(f"{task} needs {missing}; give {'it' if len(missing) == 1 else 'them'} in the task's table")

"""`[execution]`: how the work is done, as frozen, checked values; nothing here changes what is learned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from headwater.methods import Frozen


class Served(Frozen):
    """A teacher behind a vLLM server (docs/algorithms.md, "A teacher served elsewhere")."""

    url: str = Field(pattern=r"^https?://")
    """As clients of the OpenAI protocol are given it: `http://HOST:8000/v1`."""
    model: str = ""
    """Its name there; unset = the server's base model."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Of a request: the completions of one prompt, or the scores of one completion."""
    requests: int = Field(default=32, ge=1)
    """Under way at once."""

    @property
    def root(self) -> str:
        """The URL without /v1."""
        return self.url.rstrip("/").removesuffix("/v1")


class ServedStudent(Served):
    """A vLLM server that samples from the model under training (docs/algorithms.md, "vLLM samples from the student"):
    one that runs at `url`, or one that every stage starts with `python`."""

    url: str = Field(default="", pattern=r"^(https?://.*)?$")
    python: str = ""
    """An interpreter that has vLLM."""
    arguments: tuple[str, ...] = ()
    """More of vLLM's for `python`, such as `["--gpu-memory-utilization", "0.4"]`."""
    directory: str = ""
    """Where weights are handed over, in files that the server can read; unset = the stage's directory."""

    @model_validator(mode="after")
    def _one(self) -> ServedStudent:
        if bool(self.url) == bool(self.python):
            raise ValueError("give `url` of a vLLM server that runs or `python` of an environment with vLLM, not both")
        return self


class Execution(Frozen):
    """How the work is done; recorded, never part of a stage's key."""

    executor: str = "inline"
    """`inline`, or `local:N` for N single-thread processes."""
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    """Torch threads of a process; unset = all cores inline, one in `local:N`."""
    micro_batch_tokens: int = Field(default=16_384, ge=1)
    """Padded tokens (rows x length) of one forward-backward pass."""
    sampler_tokens: int = Field(default=262_144, ge=1)
    """Padded tokens (rows x (prompt + completion)) decoded at once: bounds the KV cache."""
    chunk_tokens: int = Field(default=1024, ge=1)
    """Tokens whose logits exist at once; the losses take fewer where those logits would be larger than the LM head."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Of one device, in any currency: bills and plans get a price."""
    trackers: tuple[Literal["trackio", "wandb", "tensorboard"], ...] = ()
    """Mirrors of every stage's metrics.jsonl (extra `trackers`), never the source of truth: one run a stage."""
    project: str = ""
    """Under which they are filed; unset = the recipe's name."""
    save_every: int = Field(default=20, ge=1)
    log_every: int = Field(default=1, ge=1)
    """Steps between rows of metrics; the last step always has one."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations inside a stage, for learning curves; 0 = none."""
    eval_problems: int = Field(default=64, ge=1)
    monitor_every: int = Field(default=0, ge=0)
    """Steps between measurements of condition C2 inside a stage with a teacher; 0 = at its start and end alone."""
    monitor_problems: int = Field(default=16, ge=0)
    """Held-out prompts for them, of the first evaluation; 0 = never measured."""
    grader_workers: int = Field(default=1, ge=1)
    grader_timeout_s: float = Field(default=5.0, gt=0)
    grader_memory_mb: int = Field(default=2048, ge=64)
    audit_grader: str | None = None
    """Second grader of `grpo` and `joint` stages (docs/metrics.md, "Audit"); unset = the one of the task, if it has."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile the decoder layers on CUDA: updates and scoring become faster, the first takes half a minute longer."""
    spread_teacher: bool = False
    """Lay a frozen teacher's layers out over all visible GPUs (needs accelerate: `pip install headwater[gguf]`)."""
    teacher: Served | None = None
    """Who samples and scores for a frozen teacher, whose weights are then not loaded here."""
    sampler: ServedStudent | None = None
    """Who samples in `grpo`, `distill` and `joint` from the model that they train; unset = this process."""

    @field_validator("executor")
    @classmethod
    def _executor(cls, value: str) -> str:
        name, _, count = value.partition(":")
        if value != "inline" and not (name == "local" and count.isdigit() and int(count) >= 1):
            raise ValueError(f"executor {value!r}: use 'inline' or 'local:N' with N >= 1")
        return value

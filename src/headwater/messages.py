"""Errors as a user of the command line sees them."""

from __future__ import annotations

import typer


class explained:
    """What a user can mend becomes one message and exit code 2; a failure while training, exit code 1."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, KeyboardInterrupt):
            typer.echo("stopped; the same command goes on from the last checkpoint", err=True)
            raise typer.Exit(130)
        if isinstance(error, ValueError | OSError | RuntimeError):
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, ValueError) else 1)
        return False

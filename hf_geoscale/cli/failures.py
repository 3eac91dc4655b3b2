"""The one place that turns expected errors into one line; all others keep their traceback."""

import sys
import traceback
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ..errors import NonFiniteWeightsError, UnsupportedAttentionError, UnsupportedModelError

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended: 128 + SIGINT, as shells have it."""


class InputError(ValueError):
    """An argument, file or folder of the user that cannot be used. The message names the culprit and the remedy."""


class RunError(RuntimeError):
    """The end of a run that could not go on. The message names the cause, the files that are left, and the remedy."""


EXPECTED = (InputError, RunError, NonFiniteWeightsError, UnsupportedAttentionError, UnsupportedModelError)


def require(package: str, purpose: str) -> None:
    """Raise InputError, naming the package and its purpose, unless a package can be imported."""
    try:
        __import__(package)
    except ImportError as error:
        raise InputError(f"{purpose} needs {package} ({error}): pip install {package}") from error


def condensed(error: BaseException, limit: int = 300) -> str:
    """The message of another library's error, on one line of at most `limit` characters, without its full stop."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def failed_write(error: BaseException) -> str | None:
    """Why a file could not be written, as far as safetensors and torch say; None for any other error.

    Neither raises OSError: safetensors has an error of its own, and torch's writer of zip files a RuntimeError.
    """
    text = str(error)
    if type(error).__name__ == "SafetensorError" and "serializing: I/O error" in text:
        return condensed(error).partition("I/O error: ")[2]
    if isinstance(error, RuntimeError) and ("inline_container.cc" in text or "PytorchStreamWriter" in text):
        return "the disk may be full"
    return None


def one_line(error: BaseException) -> str | None:
    """Message of an expected error for the user; None for an error that keeps its traceback."""
    if isinstance(error, EXPECTED):
        return str(error)
    if (reason := failed_write(error)) is not None:
        return f"a file could not be written: {reason}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's; not worth importing torch here
        return f"out of memory; try a shorter --length or a smaller --batch-size ({condensed(error, 120)})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None


class Commands(TyperGroup):
    """All commands. Every error that a command raises ends here."""

    def invoke(self, ctx: Any) -> Any:
        errors = Console(stderr=True)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            errors.print("Interrupted.", style="red")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader of a pipe has gone; typer ends quietly
            raise
        except Exception as error:
            if hasattr(error, "exit_code") or isinstance(error, typer.Abort):  # typer's own
                raise
            message = one_line(error)
            if message is None or ctx.params.get("traceback"):
                traceback.print_exception(error, file=sys.stderr)
            if message is None:
                errors.print(
                    "This error was not expected. Please report it, with the lines above and the output of `hf-geoscale env`.",
                    style="red",
                )
            else:
                errors.print("[red]Error:[/red]", end=" ")
                errors.print(message, highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(1) from None

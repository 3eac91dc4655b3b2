"""Commands and their options."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

app = typer.Typer(
    help="FP8 attention for Hugging Face Transformers, with scales read off the weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Hub id, local folder, or a .gguf file.")]
Dtype = Literal["float32", "bfloat16"]


def _fail(error: Exception) -> typer.Exit:
    errors.print(f"[red]{type(error).__name__}[/red]: {error}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


@app.command()
def inspect(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="Run this text too: observed maxima and utilisation.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to run, one sequence.")] = 1024,
    json: Annotated[bool, typer.Option("--json", help="Rows of geometry_report as JSON, every head.")] = False,
) -> None:
    """Print what a model's weights promise: spectral norms and certificates, a row a layer."""
    from .inspect import inspect_model

    try:
        inspect_model(model, text, max_tokens, json, console)
    except (ValueError, OSError, ImportError) as error:
        raise _fail(error) from error


@app.command()
def finetune(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for metrics, plot, card, checkpoints and the model.")],
    text: Annotated[Path | None, typer.Option(help="Text file; default: the English of Python's own manual.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id or local folder for `datasets` (extra: data).")] = None,
    column: Annotated[str, typer.Option(help="The data set's column of text.")] = "text",
    scaling: Annotated[
        Literal["geometry", "none"], typer.Option(help="FP8 attention, or the model as it is.")
    ] = "geometry",
    precision: Annotated[Literal["standard", "high"], typer.Option(help="high: k as two FP8 terms.")] = "standard",
    every_n_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps between refreshes.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(min=0, help="AdamW, linear decay after 10 % warm-up.")] = 5e-5,
    dtype: Annotated[Dtype, typer.Option(help="bfloat16: autocast over float32 weights.")] = "float32",
    eval_sequences: Annotated[int, typer.Option(min=1, help="Sequences held out for the evaluation loss.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the data order and of dropout.")] = 0,
    save_steps: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: none.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in the output folder.")] = False,
    save_model: Annotated[bool, typer.Option(help="Write the fine-tuned model at the end.")] = True,
    baseline: Annotated[Path | None, typer.Option(help="Another run's folder, to compare with.")] = None,
) -> None:
    """Fine-tune a causal language model, with FP8 attention or without, and write down how it went."""
    from .finetune import Settings, finetune_model

    settings = Settings(
        model=model,
        text=None if text is None else str(text),
        dataset=dataset,
        column=column,
        scaling=scaling,
        precision=precision,
        every_n_steps=every_n_steps,
        steps=steps,
        length=length,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dtype=dtype,
        eval_sequences=eval_sequences,
        seed=seed,
    )
    try:
        finetune_model(settings, output, save_steps, resume, overwrite, save_model, baseline, console)
    except (ValueError, OSError, ImportError) as error:
        raise _fail(error) from error


@app.command()
def transients(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for transients.jsonl, .md and .png.")],
    text: Annotated[Path | None, typer.Option(help="Text file; default: the English of Python's own manual.")] = None,
    scenario: Annotated[list[str] | None, typer.Option(help="One of them; may be repeated. Default: all.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="One of them; may be repeated. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Data orders of the scenarios with training.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a scenario with training.")] = 12,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(min=0, help="AdamW, before the spike.")] = 2e-5,
) -> None:
    """Change a model's weights suddenly under every scaling strategy, and count what overflows."""
    from .transients import SCENARIOS, STRATEGIES, Settings, run_transients

    try:
        settings = Settings(
            model=model,
            text=None if text is None else str(text),
            scenarios=tuple(scenario or SCENARIOS),
            strategies=tuple(strategy or STRATEGIES),
            seeds=seeds,
            steps=steps,
            length=length,
            batch_size=batch_size,
            learning_rate=learning_rate,
        )
        run_transients(settings, output, console)
    except (ValueError, OSError, ImportError) as error:
        raise _fail(error) from error
    console.print((output / "transients.md").read_text(), markup=False, highlight=False, soft_wrap=True)

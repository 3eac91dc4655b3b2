"""Commands and their options."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from .failures import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

DATA, ATTENTION, TRAINING, OUTPUT = "Data", "FP8 attention", "Training", "Output and resuming"

Model = Annotated[str, typer.Argument(help="Hub id, folder (of a model or a PEFT adapter), or .gguf file.")]
Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", rich_help_panel=DATA, help="Text in UTF-8. Default: the manual of Python, in English."
    ),
]


Scaling = Literal["geometry", "none"]
Precision = Literal["standard", "high"]
Dtype = Literal["float32", "bfloat16"]


def _option(help: str, panel: str, metavar: str | None = "N", **options: Any) -> Any:
    """An option in a panel of --help; short names of values leave room at 80 columns."""
    return typer.Option(help=help, rich_help_panel=panel, metavar=metavar, **options)


def _flag(names: str, help: str) -> Any:
    return typer.Option(names, help=help, rich_help_panel=OUTPUT)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"hf-geoscale {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Print tracebacks of expected errors too.")] = False,
) -> None:
    """FP8 attention for Hugging Face Transformers, with scales read off the weights."""


@app.command()
def env(
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print the contents of a bug report: versions, GPUs, the kernels that run here, and why no faster ones do."""
    from .environment import print_environment

    print_environment(json, console)


@app.command()
def inspect(
    model: Model,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Run this text too: observed maxima and utilisation.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of the text to run, one sequence.")
    ] = 1024,
    wide: Annotated[bool, typer.Option("--wide", help="All columns, about 190 characters.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Rows of geometry_report as JSON, every head.")] = False,
) -> None:
    """Print spectral norms and certificates of a model's weights, a row a layer."""
    from .inspect import inspect_model

    inspect_model(model, text, max_tokens, json, wide, console)


@app.command()
def finetune(
    model: Model,
    output: Annotated[Path, _option("For metrics, card, plot, checkpoints and the model.", OUTPUT, "FOLDER")],
    text: Text = None,
    dataset: Annotated[str | None, _option("Hub id or folder for `datasets`, instead of a text.", DATA, "NAME")] = None,
    column: Annotated[str, _option("The data set's column of text.", DATA, "NAME")] = "text",
    split: Annotated[str, _option("The data set's split.", DATA, "NAME")] = "train",
    eval_sequences: Annotated[int, _option("Sequences held out for the evaluation loss.", DATA, min=1)] = 4,
    scaling: Annotated[Scaling, _option("FP8 attention, or the model as it is.", ATTENTION, None)] = "geometry",
    precision: Annotated[Precision, _option("high: k as two FP8 terms.", ATTENTION, None)] = "standard",
    every_n_steps: Annotated[int, _option("Optimizer steps between refreshes.", ATTENTION, min=1)] = 1,
    steps: Annotated[int, _option("Optimizer steps.", TRAINING, min=1)] = 40,
    length: Annotated[int, _option("Tokens of a sequence.", TRAINING, min=2)] = 256,
    batch_size: Annotated[int, _option("Sequences of a step.", TRAINING, min=1)] = 1,
    learning_rate: Annotated[
        float, _option("AdamW's; linear decay after 10 % warm-up.", TRAINING, "RATE", min=0)
    ] = 5e-5,
    dtype: Annotated[Dtype, _option("bfloat16: autocast over float32 weights.", TRAINING, None)] = "float32",
    seed: Annotated[int, _option("Of the data order and of dropout.", TRAINING, min=0)] = 0,
    save_steps: Annotated[int, _option("Steps between checkpoints; 0: only after Ctrl-C.", OUTPUT, min=0)] = 0,
    resume: Annotated[bool, _flag("--resume", "Go on from the last whole checkpoint.")] = False,
    overwrite: Annotated[bool, _flag("--overwrite", "Replace an earlier run in the folder.")] = False,
    save_model: Annotated[bool, _flag("--save-model/--no-save-model", "Write the model at the end.")] = True,
    baseline: Annotated[Path | None, _option("Another run, to compare with.", OUTPUT, "FOLDER")] = None,
) -> None:
    """Fine-tune a causal language model, with FP8 attention or without, and write down how it went.

    Ctrl-C stops at the end of a step with a checkpoint; --resume goes on from it, to the same losses as an uninterrupted run.
    """
    from .finetune import Options, Settings, finetune_model

    settings = Settings(
        model=model,
        text=None if text is None else str(text),
        dataset=dataset,
        column=column,
        split=split,
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
    options = Options(save_steps, resume, overwrite, save_model, baseline)
    raise typer.Exit(finetune_model(settings, output, options, console))


@app.command()
def transients(
    model: Model,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="For transients.jsonl, .md and .png.")],
    text: Text = None,
    scenario: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="One of them; may be repeated. Default: all.")
    ] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="One of them; may be repeated. Default: all.")
    ] = None,
    seeds: Annotated[int, _option("Data orders of the scenarios with training.", TRAINING, min=1)] = 3,
    steps: Annotated[int, _option("Optimizer steps of a scenario with training, at least 9.", TRAINING)] = 12,
    length: Annotated[int, _option("Tokens of a sequence.", TRAINING, min=2)] = 128,
    batch_size: Annotated[int, _option("Sequences of a step.", TRAINING, min=1)] = 1,
    learning_rate: Annotated[float, _option("AdamW's, before the spike.", TRAINING, "RATE", min=0)] = 2e-5,
) -> None:
    """Change a model's weights suddenly under every scaling strategy, and count overflows."""
    from .transients import SCENARIOS, STRATEGIES, Settings, run_transients

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

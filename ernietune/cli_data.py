"""`ernietune data`: check, show and count records before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ernietune.errors import ConfigError

if TYPE_CHECKING:  # `--help` does without what reads configurations
    from ernietune.config import DataSection

data_app = typer.Typer(no_args_is_help=True, help="Check, show and count training data before training.")

Files = Annotated[list[Path], typer.Argument(help="Data files or folders, or one training configuration.")]
Model = Annotated[
    str | None, typer.Option(help="A model folder, run or hub id: its tokenizer and chat format.")
]
Template = Annotated[str, typer.Option(help="Chat format: auto, text, thinking, vl, vl_thinking.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of a row; by default the model's context.")]
Form = Annotated[
    str,
    typer.Option(
        "--format", help="Form of the records: auto, messages, erniekit, alpaca, sharegpt, preference."
    ),
]
TrainOn = Annotated[str, typer.Option(help="Which answers are trained: all, last.")]
AllTurns = Annotated[
    bool, typer.Option("--train-all-turns", help="All answers in one sequence, as a history shows them.")
]


@data_app.command("check")
def data_check(
    files: Files,
    model: Annotated[
        str | None, typer.Option(help="Encode with this model's chat format; without it: schema and media.")
    ] = None,
    max_length: MaxLength = None,
    form: Form = "auto",
    template: Template = "auto",
) -> None:
    """Read every record and name all that is wrong by file:line; exit with 2 if anything is.

    Of a training configuration: its data as the training will read them, with its model and settings.
    """
    from ernietune.data import commands

    data = commands.data_section(max_length, form, "all", False)
    training = commands.training_of(files, model, template, data, typer.echo)
    if training is None:
        fine = commands.run_check(files, model, template, data)
    else:
        fine = commands.run_check_of_training(training)
    if not fine:
        raise typer.Exit(2)


@data_app.command("preview")
def data_preview(
    files: Files,
    model: Model = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page, with the pictures in place.")] = None,
    first: Annotated[int, typer.Option(min=0, help="Number of the first record, from 0.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many records of each file.")] = 3,
    max_length: MaxLength = None,
    form: Form = "auto",
    template: Template = "auto",
    train_on: TrainOn = "all",
    train_all_turns: AllTurns = False,
) -> None:
    """Show samples as the model gets them: which tokens are trained, lengths, packing."""
    from ernietune.data import commands

    data = commands.data_section(max_length, form, train_on, train_all_turns)
    paths, name, template, data = _what(files, model, template, data)
    commands.run_preview(paths, name, template, data, range(first, first + count), html)


@data_app.command("stats")
def data_stats(
    files: Files,
    model: Model = None,
    max_length: MaxLength = None,
    form: Form = "auto",
    template: Template = "auto",
    train_on: TrainOn = "all",
    train_all_turns: AllTurns = False,
) -> None:
    """Count tokens, trained tokens, images and videos; lengths, and what --max-length would leave out."""
    from ernietune.data import commands

    data = commands.data_section(max_length, form, train_on, train_all_turns)
    paths, name, template, data = _what(files, model, template, data)
    commands.run_stats(paths, name, template, data)


def _what(
    files: list[Path], model: str | None, template: str, data: DataSection
) -> tuple[list[Path], str, str, DataSection]:
    """Files, model, chat format and settings, as a training configuration or the options say."""
    from ernietune.data import commands

    training = commands.training_of(files, model, template, data, typer.echo)
    if training is not None:
        paths = [Path(path) for path in [*training.data.train, *training.data.eval]]
        return paths, training.model.path, training.model.template, training.data
    if model is None:
        raise ConfigError("--model is missing; give it, or a training configuration in the place of the data")
    return files, model, template, data

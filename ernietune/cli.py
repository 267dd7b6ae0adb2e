"""The `ernietune` command: each sub-command imports what it needs when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ernietune import environment
from ernietune.errors import ErnietuneError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")]


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit code 2."""
    try:
        app()
    except ErnietuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def train(
    config: Path,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; needs no weights and no paddle.")
    ] = False,
) -> None:
    """Fine-tune as a YAML file says; keys can be overridden: train.steps=20 lora.rank=8."""
    from ernietune import config as configuration

    settings = configuration.load(config, overrides or [])
    if dry_run:
        from ernietune.train import plan

        plan.print_plan(settings)
        return
    environment.require_paddle()
    from ernietune.train import run

    run.main(settings)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run folder, a checkpoint of it, or an adapter folder.")],
    output: Annotated[Path, typer.Option(help="New folder for the merged model.")],
    base: Annotated[Path | None, typer.Option(help="Base model, when it has moved since training.")] = None,
    shard_gb: Annotated[float, typer.Option(help="Largest shard in GB.")] = 5.0,
) -> None:
    """Merge an adapter into its base: original names and layout, untouched tensors byte for byte."""
    from ernietune import export as exporting

    report = exporting.export(source, output, base, int(shard_gb * 1e9))
    typer.echo(str(report))


@app.command()
def init(
    output: Path,
    shape: Annotated[str, typer.Option(help="A published or tiny shape, such as vl-28b-a3b or tiny-vl.")],
    layers: Annotated[int | None, typer.Option(help="Cut the text model to this many layers.")] = None,
    layout: Annotated[str, typer.Option(help="pt or paddle.")] = "pt",
    seed: int = 0,
) -> None:
    """Write a random checkpoint of a shape, with tokenizer and processor files."""
    from ernietune.initialize import initialize

    initialize(shape, output, layers=layers, layout=layout, seed=seed)
    typer.echo(f"wrote {output}")

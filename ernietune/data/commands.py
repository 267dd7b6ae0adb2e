"""What the sub-commands of `ernietune data` do, from their options to printed text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import cast, get_args

from rich.console import Console

from ernietune.checkpoint.processor import Processor
from ernietune.compat import load
from ernietune.config import Config, DataSection
from ernietune.config_rules import CHOICES
from ernietune.data import check, preview, stats
from ernietune.data.build import encoder_of, processor_for
from ernietune.data.dataset import Encoder, Sample
from ernietune.data.formats import Form, form_of_source
from ernietune.data.records import encode_record
from ernietune.data.sources import open_source
from ernietune.errors import ConfigError


def run_check(files: Sequence[Path], model: str | None, template: str, data: DataSection) -> bool:
    """Print everything that is wrong and a summary; True when nothing is."""
    if model is None and (data.max_length or template != "auto"):
        raise ConfigError("--max-length and --template need --model; without it only the schema is checked")
    encoder = encoder_of(data, _processor(model, template, data)) if model else None
    return _say(check.check(files, encoder, form_of(data), data.workers))


def run_check_of_training(config: Config) -> bool:
    """The same for the data of a training, encoded as it will be."""
    processor = processor_for(config.model.path, config.model.template)
    return _say(check.check_training(config, processor))


def _say(report: check.Report) -> bool:
    print("\n".join(check.lines(report)))
    return not report.findings


def run_preview(
    files: Sequence[Path], model: str, template: str, data: DataSection, span: range, html: Path | None
) -> None:
    """Print the records of `span` of each file as samples, and write them as a page."""
    processor = _processor(model, template, data)
    encoder = encoder_of(data, processor)
    samples = [sample for file in files for sample in _samples(file, encoder, form_of(data), span)]
    placeholder = encoder.vision.placeholder if encoder.vision else None
    contents = [
        list(preview.pieces(sample, processor.tokenizer, placeholder, encoder.limits)) for sample in samples
    ]
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for sample, content in zip(samples, contents, strict=True):
        console.print(preview.headline(sample), style="bold")
        console.print(preview.to_text(content), end="\n\n")
    console.print(preview.packing_line(preview.packed(samples, encoder.max_length), encoder.max_length))
    if html is not None:
        html.write_text(preview.to_html(samples, contents, encoder.max_length), encoding="utf-8")
        console.print(f"wrote {html}")


def run_stats(files: Sequence[Path], model: str, template: str, data: DataSection) -> None:
    """Print lengths, trained tokens and images, and what the length limit leaves out."""
    encoder = encoder_of(data, _processor(model, template, data))
    found = stats.stats(files, encoder, form_of(data), data.workers)
    print("\n".join(stats.lines(found, encoder.max_length)))


def training_of(
    files: Sequence[Path], model: str | None, template: str, data: DataSection, say: Callable[[str], None]
) -> Config | None:
    """The training that is meant when the one file is a YAML file, ours or ERNIEKit's; None for data files.

    ConfigError when anything is said besides, because the file says it.
    """
    named = [file for file in files if file.suffix in (".yaml", ".yml")]
    if not named:
        return None
    if len(files) > 1 or model or template != "auto" or data != data_section(None, "auto", "all", False):
        raise ConfigError(
            f"{named[0]} names its data, model and settings: give it alone, without --model and the like"
        )
    return load.load(named[0], say=say)


def data_section(max_length: int | None, form: str, train_on: str, all_turns: bool) -> DataSection:
    """The options as a data section; max_length 0 stands for the model's context. ConfigError if wrong."""
    for option, key, value in (("--format", "data.format", form), ("--train-on", "data.train_on", train_on)):
        if value not in CHOICES[key]:
            choices = ", ".join(CHOICES[key])
            raise ConfigError(f"{option} is {value!r}; it must be one of {choices}")
    if max_length is not None and max_length < 1:
        raise ConfigError(f"--max-length is {max_length}; it must be at least 1")
    return DataSection(max_length=max_length or 0, format=form, train_on=train_on, train_all_turns=all_turns)


def form_of(data: DataSection) -> Form | None:
    """The form that is said, None to recognise it."""
    return cast(Form, data.format) if data.format in get_args(Form) else None


def _processor(model: str, template: str, data: DataSection) -> Processor:
    processor = processor_for(model, template)
    data.max_length = data.max_length or processor.config.max_position_embeddings
    return processor


def _samples(file: Path, encoder: Encoder, form: Form | None, span: range) -> list[Sample]:
    source = open_source(file)
    if span.start >= len(source):
        raise ConfigError(f"--first is {span.start}, but {file} has {len(source)} records")
    of_file = form or form_of_source(source)
    rows = islice(range(len(source)), span.start, span.stop)
    return [sample for row in rows for sample in encode_record(source, row, encoder, of_file)]

"""`ernietune data check`: every record read and encoded, everything wrong named, nothing trained."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ernietune.checkpoint.processor import Processor
from ernietune.config import Config
from ernietune.data.build import records_of
from ernietune.data.dataset import BadRecord, Encoder, Sample, Skipped
from ernietune.data.formats import Form, form_of_source
from ernietune.data.pairs import Pair
from ernietune.data.records import encode_record
from ernietune.data.sources import Source, open_source
from ernietune.data.stream import ordered_map
from ernietune.errors import DataError
from ernietune.text.fields import FieldError


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: `detail` begins with file:line, `field` is the way to it in the record."""

    reason: str
    field: str
    detail: str

    @property
    def kind(self) -> tuple[str, str]:
        """What a summary counts it under: the reason, and the field without its numbers."""
        return self.reason, re.sub(r"\d+", "", self.field)


@dataclass
class Report:
    """What a check of some files found; `trained` counts the tokens that would be."""

    records: int = 0
    samples: int = 0
    tokens: int = 0
    trained: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def summary(self) -> list[tuple[str, str, int]]:
        """(reason, field, how often), the most frequent first."""
        counts = Counter(finding.kind for finding in self.findings)
        return [(reason, path, count) for (reason, path), count in counts.most_common()]


def check(
    paths: Sequence[str | Path], encoder: Encoder | None = None, form: Form | None = None, workers: int = 0
) -> Report:
    """Check all records of some files; without an encoder the schema and the images only.

    Preference pairs are checked as such. Never raises DataError: whatever is wrong is in the report.
    """
    report = Report()
    for path in paths:
        try:
            source = open_source(path)
        except DataError as error:
            report.findings.append(Finding("unreadable file", "", str(error)))
            continue
        _check_source(source, encoder, form or form_of_source(source), workers, report)
    return report


def check_training(config: Config, processor: Processor) -> Report:
    """Check the records of a training's files as the training will read them, pairs as pairs.

    What `data.on_error` or `data.overlong` would leave out is a finding too.
    """
    report, strict = Report(), replace(config, data=replace(config.data, on_error="error"))
    for path in [*config.data.train, *config.data.eval]:
        try:
            records = records_of(strict, [path], processor)
        except DataError as error:
            report.findings.append(Finding("unreadable file", "", str(error)))
            continue
        _check_all(records.samples, len(records), config.data.workers, report)
    return report


def _check_source(source: Source, encoder: Encoder | None, form: Form, workers: int, report: Report) -> None:
    _check_all(lambda row: list(encode_record(source, row, encoder, form)), len(source), workers, report)


def _check_all(
    encode: Callable[[int], Sequence[Sample | Pair | Skipped]], count: int, workers: int, report: Report
) -> None:
    """Encode all records of a file, and add what they give, or what is wrong with them, to the report."""
    for result in ordered_map(partial(_examine, encode), range(count), workers):
        report.records += 1
        if isinstance(result, Finding):
            report.findings.append(result)
            continue
        for sample in result:
            report.samples += 1
            report.tokens += len(sample)
            report.trained += sample.trained


def _examine(
    encode: Callable[[int], Sequence[Sample | Pair | Skipped]], row: int
) -> list[Sample | Pair] | Finding:
    found: list[Sample | Pair] = []
    try:
        for result in encode(row):
            if isinstance(result, Skipped):
                return Finding(result.reason, "", result.detail)
            found.append(result)
    except BadRecord as error:
        return Finding(error.reason, error.field, str(error))
    except FieldError as error:
        return Finding("malformed", error.path, str(error))
    except DataError as error:
        return Finding("malformed", "", str(error))
    return found


def lines(report: Report) -> list[str]:
    """Every finding, then the summary by reason."""
    text = [f"{finding.detail}  [{finding.reason}]" for finding in report.findings]
    counted = f"{report.samples:,} samples, {report.tokens:,} tokens, {report.trained:,} of them trained"
    tail = f"; {counted}" if report.samples else ""
    if not report.findings:
        return [f"{report.records:,} records, nothing wrong{tail}"]
    text += ["", f"{report.records:,} records, {len(report.findings):,} wrong{tail}"]
    width = max(len(f"{count:,}") for _, _, count in report.summary)
    return text + [
        f"  {count:>{width},}  {reason}  {path}".rstrip() for reason, path, count in report.summary
    ]

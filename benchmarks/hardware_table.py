"""The generated parts of docs/hardware.md: what every shipped configuration needs, and one case written out.

python benchmarks/hardware_table.py            rewrite them
python benchmarks/hardware_table.py --check    exit code 1 when they are out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from ernietune.config import load
from ernietune.estimate.activations import decoder_block
from ernietune.estimate.changes import first_that_fits
from ernietune.estimate.report import Estimate, estimate, resolved
from ernietune.estimate.setup import GIB, Setup, setup_of
from ernietune.estimate.walk import CONTEXT, SLACK
from ernietune.models.config import SHAPES, ModelConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "hardware.md"
WRITTEN_OUT = "vl28b/sft_lora_8k_1x80"
CARDS = (24, 48, 80, 141)


def setup_for(path: Path) -> Setup:
    """The setup of a shipped configuration on cards of 80 GiB, as many as it names."""
    own = ["model.shape=demo-vl"] if path.parent.name == "tiny" else []
    config = load(path, own)
    geometry = ModelConfig.from_dict(SHAPES[str(config.model.shape)], str(config.model.shape))
    return resolved(setup_of(config, geometry), 80)


def row(path: Path) -> str:
    """A line of the table."""
    setup = setup_for(path)
    found = estimate(setup)
    fitting = [f"{memory}" for memory in CARDS if found.needed <= memory * GIB]
    fits = found.needed <= 80 * GIB
    change = "" if fits else first_that_fits(setup, 80) or "none of the single changes"
    trains = f"LoRA {setup.config.lora.rank}" if setup.config.lora.enabled else "full"
    cells = [
        f"`{path.parent.name}/{path.stem}`",
        f"{trains}, {setup.config.train.rows} x {setup.config.data.max_length}",
        _degrees(setup),
        setup.config.train.recompute,
        f"{found.needed / GIB:.1f}",
        fitting[0] if fitting else "-",
        change,
        f"{found.work.total / 1e15:.3g}",
    ]
    return f"| {' | '.join(cells)} |"


def _degrees(setup: Setup) -> str:
    """How many processes, and by what they divide the model."""
    degrees = setup.degrees
    by = {"expert": degrees.expert, "tensor": degrees.tensor}
    named = ", ".join(f"{name} {degree}" for name, degree in by.items() if degree > 1)
    return f"{degrees.world}: {named}" if named else f"{degrees.world}"


def table() -> str:
    """All shipped configurations."""
    head = (
        "| configuration | trains, tokens | cards | recompute | GiB on each | smallest card | for 80 GiB "
        "| PFLOP a step |\n"
    )
    paths = sorted((ROOT / "configs").glob("*/*.yaml"))
    return head + "|---|---|---|---|--:|--:|---|--:|\n" + "\n".join(row(path) for path in paths) + "\n"


def arithmetic() -> str:
    """The memory of one configuration, number by number."""
    setup = setup_for(ROOT / "configs" / f"{WRITTEN_OUT}.yaml")
    found = estimate(setup)
    lines = [f"`configs/{WRITTEN_OUT}.yaml`, `ernietune estimate`:", "```"]
    lines += [f"{name:16} {text:74} {size / GIB:6.2f}" for name, text, size in _terms(setup, found)]
    whole = found.peak.total
    lines += [
        f"{'together':16} {'':74} {whole / GIB:6.2f}",
        f"{'the card':16} {f'x {1 + SLACK:.2f} slack + {CONTEXT / GIB:.0f} GiB CUDA context':74} "
        f"{found.needed / GIB:6.2f}",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _terms(setup: Setup, found: Estimate) -> list[tuple[str, str, float]]:
    g, parts = setup.geometry, found.peak.parts
    numbers = sum(setup.adapted.values())
    routers = sum(size for path, size in _sizes(setup).items() if ".router." in path)
    every = sum(_sizes(setup).values())
    block = decoder_block(setup, g.num_hidden_layers - 1)
    attention, mlp = block.attention, block.mlp
    width = attention.norm
    kept = g.num_hidden_layers * width + 8 * setup.tokens
    terms = [
        ("weights", f"{every:,} x 2 + 2 more for {routers:,} of routers", 2.0 * every + 2 * routers),
        ("adapters", f"{numbers:,} x 4", 4.0 * numbers),
        ("optimizer", f"{numbers:,} x 8", 8.0 * numbers),
        ("gradients", f"{numbers:,} x 4, less those of the first layers", parts["gradients"]),
        (
            "activations",
            f"{g.num_hidden_layers} layers x {setup.tokens} x {g.hidden_size} x 2, less the last; masks",
            kept - width,
        ),
        (
            "working memory",
            f"one layer again: attention {attention.full / GIB:.2f}, MoE {mlp.full / GIB:.2f}, "
            f"its backward {mlp.backward / GIB:.2f}",
            attention.full + mlp.full + mlp.backward,
        ),
    ]
    assert abs(sum(size for _, _, size in terms) - found.peak.total) < 0.02 * found.peak.total, terms
    return terms


def _sizes(setup: Setup) -> dict[str, int]:
    sizes = {}
    for path, shape in setup.shapes.items():
        sizes[path] = 1
        for length in shape:
            sizes[path] *= length
    return sizes


def filled(page: str) -> str:
    """The page with its generated parts as they should be."""
    for name, text in (("table", table()), ("arithmetic", arithmetic())):
        before, rest = page.split(f"<!-- generated: {name} -->\n")
        _, after = rest.split(f"<!-- /generated: {name} -->\n")
        page = f"{before}<!-- generated: {name} -->\n{text}<!-- /generated: {name} -->\n{after}"
    return page


def main() -> None:
    """Rewrite or check the page."""
    page = PAGE.read_text(encoding="utf-8")
    if sys.argv[1:] == ["--check"]:
        if filled(page) != page:
            sys.exit(f"{PAGE} is out of date: run python benchmarks/hardware_table.py")
        return
    PAGE.write_text(filled(page), encoding="utf-8")


if __name__ == "__main__":
    main()

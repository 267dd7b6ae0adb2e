"""The `ernietune` command: each sub-command imports what it needs when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ernietune import environment
from ernietune.cli_data import data_app
from ernietune.errors import ConfigError, ErnietuneError
from ernietune.serve.flags import HELP, PARSER_HELP, ServeCommand, explain

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)

config_app = typer.Typer(no_args_is_help=True, help="Configuration files.")
adapter_app = typer.Typer(no_args_is_help=True, help="LoRA adapters.")
app.add_typer(config_app, name="config")
app.add_typer(adapter_app, name="adapter")
app.add_typer(data_app, name="data")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")]
Lenient = Annotated[
    bool, typer.Option("--lenient", help="Leave out keys of ERNIEKit's that cannot be honoured, and say so.")
]


Dtype = Annotated[
    str,
    typer.Option(help="How weights are held: auto, float32, bfloat16. auto keeps bfloat16 checkpoints so."),
]
Quantization = Annotated[
    str | None, typer.Option(help="Round weights on load: wint8, wint4, mixed (experts wint4); on a GPU fp8.")
]
Strict = Annotated[bool, typer.Option("--strict-model-name", help="Refuse requests for other model names.")]
LoraModules = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PATH", help="Serve these adapters too, each by its name as the model."),
]
LoraFolder = Annotated[
    Path | None,
    typer.Option(
        "--allow-lora-loading", help="Folder whose adapters clients may load and unload at run time."
    ),
]
MediaFolder = Annotated[
    Path | None,
    typer.Option("--allow-local-files", help="Folder whose media requests may name by path or file://."),
]
MediaDomains = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-media-domains",
        help="Fetch media from this host only, private or not. [default: any public host]",
    ),
]
MediaLimits = Annotated[
    str | None, typer.Option("--limit-mm-per-prompt", help='Such as {"image": 4, "video": 1}.')
]
MediaSettings = Annotated[
    str | None,
    typer.Option(
        "--mm-processor-kwargs", help='Such as {"image_max_pixels": 1003520, "video_max_frames": 30}.'
    ),
]
SpeculativeConfig = Annotated[
    str | None,
    typer.Option(
        "--speculative-config",
        help='Such as {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}.',
    ),
]
PageTools = Annotated[
    Path | None, typer.Option(help="A Python file whose functions the page lets the model call.")
]


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
    lenient: Lenient = False,
) -> None:
    """Fine-tune as a YAML file says; keys can be overridden: train.steps=20 lora.rank=8.

    Files of ERNIEKit and PaddleFormers work as they are.
    """
    from ernietune.compat import load

    settings = load.load(config, overrides or [], lenient, typer.echo)
    if dry_run:
        from ernietune.train import plan

        plan.print_plan(settings)
        return
    from ernietune import launch

    environment.require_paddle()
    processes = settings.parallel.data * settings.parallel.tensor
    if launch.place_for(processes) is None:
        raise typer.Exit(launch.run(processes, Path(settings.train.output) / "logs", sys.argv[1:]))
    from ernietune.train import run

    run.main(settings)


@app.command()
def estimate(
    config: Path,
    overrides: Overrides = None,
    gpu_memory: Annotated[float, typer.Option(help="GiB of a card.")] = 80.0,
    gpus: Annotated[
        int, typer.Option(min=1, help="Plan for this many: parallel.data, and parallel.expert with experts.")
    ] = 1,
    image_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens of a micro-batch that are pictures; default: half.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    lenient: Lenient = False,
) -> None:
    """Say what a training needs of a card, by part, and how long a step takes; needs no weights."""
    from ernietune.compat import load
    from ernietune.estimate import command

    settings = load.load(config, overrides or [], lenient, lambda line: typer.echo(line, err=True))
    command.run(settings, gpu_memory, gpus, image_tokens, as_json)


@config_app.command()
def convert(
    config: Annotated[Path, typer.Argument(help="A training file of ERNIEKit or PaddleFormers.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here; default: print.")] = None,
    lenient: Lenient = False,
) -> None:
    """Write ernietune's YAML for a training file of ERNIEKit or PaddleFormers; the report goes to stderr."""
    from ernietune.compat import load

    text, report = load.convert(config, overrides or [], lenient)
    typer.echo(report, err=True)
    if output is None:
        typer.echo(text, nl=False)
    else:
        load.write(text, output)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run folder, a checkpoint of it, or an adapter folder.")],
    output: Annotated[Path, typer.Option(help="New folder for the merged model.")],
    base: Annotated[Path | None, typer.Option(help="Base model, when it has moved since training.")] = None,
    shard_gb: Annotated[float, typer.Option(help="Largest shard in GB.")] = 5.0,
) -> None:
    """Merge an adapter into its base: original names and layout, untouched tensors byte for byte."""
    environment.require_paddle()
    from ernietune import export as exporting

    report = exporting.export(source, output, base, int(shard_gb * 1e9))
    typer.echo(str(report))


@adapter_app.command("convert")
def convert_adapter(
    source: Annotated[Path, typer.Argument(help="A run, or an adapter folder in either layout.")],
    output: Annotated[Path, typer.Option(help="New folder for the adapter.")],
    base: Annotated[str | None, typer.Option(help="Its base model, when that has moved.")] = None,
) -> None:
    """From ERNIEKit's and PaddleFormers' layout to PEFT's, which is ours; from ours to theirs."""
    environment.require_paddle()
    from ernietune.convert_adapter import convert

    typer.echo(convert(source, output, base))


@app.command()
def init(
    output: Path,
    shape: Annotated[str, typer.Option(help="A published or tiny shape, such as vl-28b-a3b or tiny-vl.")],
    layers: Annotated[int | None, typer.Option(help="Cut the text model to this many layers.")] = None,
    layout: Annotated[str, typer.Option(help="pt or paddle.")] = "pt",
    seed: int = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    tokenizer: Annotated[Path | None, typer.Option(help="Take the tokenizer of this folder.")] = None,
) -> None:
    """Write a random checkpoint of a shape, with tokenizer and processor files."""
    from ernietune.initialize import initialize

    initialize(shape, output, layers=layers, layout=layout, seed=seed, dtype=dtype, tokenizer=tokenizer)
    typer.echo(f"wrote {output}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, run, checkpoint, adapter or hub id.")],
    data: Annotated[list[Path], typer.Option(help="Records whose last message is the expected answer.")],
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on the model.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Ask this server instead; MODEL is the name it knows.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key for the server.")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Names with commas; default: what the data calls for.")
    ] = None,
    category: Annotated[
        str | None, typer.Option(help="Field of the records to break the figures down by.")
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Another model, or an earlier report.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for report.json and report.html.")] = None,
    blank_images: Annotated[
        bool, typer.Option("--blank-images", help="Grey pictures and frames: are they read?")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first records.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 64,
    max_length: Annotated[int | None, typer.Option(help="Context length in tokens.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file.")] = None,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
) -> None:
    """Answer held-out questions greedily and measure the answers; docs/evaluation.md explains the metrics."""
    environment.require_paddle()
    from ernietune.evaluation import run

    run.main(
        run.Task(
            model,
            data,
            adapter,
            url,
            api_key,
            blank_images,
            limit,
            max_tokens,
            max_length,
            metrics,
            category,
            compare,
            report,
            output,
            dtype,
            quantization,
        )
    )


@app.command(cls=ServeCommand, epilog=HELP)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model folder, run, checkpoint, adapter or hub id.")],
    host: str = "127.0.0.1",
    port: int = 8000,
    metrics_port: Annotated[int | None, typer.Option(help="Serve /metrics on this port too.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on the model, unmerged.")] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-model-len", help="Prompt and answer together, in tokens.")
    ] = None,
    max_sequences: Annotated[
        int, typer.Option("--max-num-seqs", help="Answers that grow at the same time.")
    ] = 16,
    max_batched_tokens: Annotated[
        int, typer.Option("--max-num-batched-tokens", help="Tokens per step of the engine.")
    ] = 512,
    served_name: Annotated[
        str | None, typer.Option("--served-model-name", help="Name in answers and in /v1/models.")
    ] = None,
    strict_model_name: Strict = False,
    lora_modules: LoraModules = None,
    max_adapters: Annotated[
        int, typer.Option("--max-loras", min=0, help="Adapters loaded at the same time.")
    ] = 16,
    lora_folder: LoraFolder = None,
    media_folder: MediaFolder = None,
    media_domains: MediaDomains = None,
    chat_template: Annotated[Path | None, typer.Option(help="A jinja file to use as chat format.")] = None,
    limit_per_prompt: MediaLimits = None,
    processor_kwargs: MediaSettings = None,
    reasoning_parser: Annotated[str | None, typer.Option(help=PARSER_HELP)] = None,
    tool_parser: Annotated[str | None, typer.Option("--tool-call-parser", help=PARSER_HELP)] = None,
    api_keys: Annotated[
        list[str] | None, typer.Option("--api-key", help="Accept requests with this key only.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seeds requests that bring none.")] = None,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    speculative: SpeculativeConfig = None,
    ui: Annotated[bool, typer.Option("--ui", help="Serve a web page to chat with, too.")] = False,
    ui_port: Annotated[int, typer.Option(help="Port of the web page.")] = 7860,
    ui_tools: PageTools = None,
) -> None:
    """Serve an OpenAI-compatible API; flags of FastDeploy and vLLM are understood."""
    options = {name: value for name, value in locals().items() if name != "context"}
    from ernietune.serve.options import Launch

    launch = Launch.of(options)
    if note := explain(context.obj):
        typer.echo(note)
    environment.require_paddle()
    from ernietune.serve import api

    api.serve(launch)


@app.command("ui")
def open_page(
    url: Annotated[list[str], typer.Option(help="A server of OpenAI's API; again for more of them.")],
    host: str = "127.0.0.1",
    port: int = 7860,
    api_key: Annotated[str, typer.Option(help="The page brings it to the servers, for all visitors.")] = "",
    tools: Annotated[
        Path | None, typer.Option(help="A Python file whose functions the models may call; its code runs.")
    ] = None,
) -> None:
    """Serve a web page to chat with models of running servers, and to compare two of them."""
    from ernietune.serve import ui
    from ernietune.serve.tools import Toolbox, load_tools

    toolbox = Toolbox() if tools is None else load_tools(tools, typer.echo)
    ui.serve_page(ui.Page(lambda: ui.offers_of(url, api_key or None), toolbox, api_key), host, port)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A model folder, run, checkpoint, adapter, hub id or URL.")],
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on the model, unmerged.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    thinking: Annotated[
        bool | None, typer.Option(help="Open a think block, where the format has a choice.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Context length in tokens.")] = None,
    api_key: Annotated[str | None, typer.Option(help="For a URL whose server wants one.")] = None,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    tools: Annotated[
        Path | None, typer.Option(help="A Python file whose functions the model may call; its code runs.")
    ] = None,
) -> None:
    """Chat in the terminal; pictures and videos by path, tools from a Python file."""
    from ernietune.serve import chat as terminal
    from ernietune.serve.tools import Toolbox, load_tools

    toolbox = Toolbox() if tools is None else load_tools(tools, typer.echo)
    if model.startswith(("http://", "https://")):
        from ernietune.serve.wire import RemoteSpeaker

        if (adapter, max_length, dtype, quantization) != (None, None, "auto", None):
            raise ConfigError(
                "--adapter, --max-length, --dtype and --quantization are for a model here; "
                "the server has its own"
            )
        terminal.chat(RemoteSpeaker(model, thinking, api_key), system, tools=toolbox)
        return
    environment.require_paddle()
    from ernietune.infer.precision import Precision
    from ernietune.serve.local import LocalSpeaker

    precision = Precision(dtype, quantization)
    speaker = LocalSpeaker.load(model, adapter, max_length, thinking, precision)
    terminal.chat(speaker, system, tools=toolbox)

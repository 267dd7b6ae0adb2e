"""What a path given to the engine stands for: a model, an adapter, a run, or a checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ernietune import config as configuration
from ernietune import hub
from ernietune.checkpoint.adapter import load_adapter, read_adapter_config
from ernietune.checkpoint.adapter_config import refuse_paddle_adapter
from ernietune.checkpoint.processor import Processor
from ernietune.checkpoint.state import checkpoint_in
from ernietune.config import Config
from ernietune.errors import CheckpointError, ConfigError
from ernietune.infer.precision import Precision
from ernietune.lora import inject
from ernietune.models.decoder import CausalLM
from ernietune.text.own_template import OwnTemplate
from ernietune.text.template import Template
from ernietune.text.tokenizer import Tokenizer

_ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """The folder of a whole model, the adapter on top of it, and the configuration of their run."""

    base: Path
    adapter: Path | None = None
    run: Config | None = None

    @classmethod
    def find(cls, path: str | Path, adapter: str | Path | None = None) -> Source:
        """Look at what lies at `path` (or download a hub id); of a run the best checkpoint is taken.

        An adapter names its base; to put it on another one give that as `path` and the adapter as `adapter`.
        """
        weights = checkpoint_in(Path(path).expanduser().absolute())
        refuse_paddle_adapter(weights)
        run = run_config(weights)
        if not (weights / _ADAPTER_FILE).is_file():
            folder = weights if weights.is_dir() else hub.resolve(str(path))
            return cls(folder, checkpoint_in(Path(adapter)) if adapter else None, run)
        if adapter is not None:
            raise CheckpointError(
                f"{path} is an adapter itself; give its base model together with an adapter"
            )
        _, base = read_adapter_config(weights)
        if not base:
            raise CheckpointError(
                f"{weights / _ADAPTER_FILE} names no base model; give the base and the adapter"
            )
        return cls(hub.resolve(base), weights, run)

    def processor(self, chat_template: Path | None = None) -> Processor:
        """Tokenizer, chat format and sizes of pictures and videos, as the run was trained with them.

        A jinja file `chat_template` goes before every other format; ConfigError when it does not work.
        """
        kind = None if self.run is None or self.run.model.template == "auto" else self.run.model.template
        processor = Processor.load(self.base, kind)
        if self.run is not None:
            data = self.run.data
            limits = processor.limits_with(data.min_pixels, data.max_pixels)
            video = processor.video.with_rate(data.fps, data.max_frames)
            processor = replace(processor, limits=limits, video=video)
        if chat_template is not None:
            processor = replace(processor, template=_from_file(chat_template, processor.tokenizer))
        return processor

    def template_options(self) -> dict[str, object]:
        """Options of the chat format that the run was trained with."""
        thinking = self.run.data.enable_thinking if self.run else None
        return {} if thinking is None else {"enable_thinking": thinking}

    def model(self, processor: Processor, precision: Precision) -> CausalLM:
        """Load the weights in the form that is asked for; the adapter stays apart from them."""
        model = precision.load(self.base, processor.config)
        if self.adapter is not None:
            spec, _ = read_adapter_config(self.adapter)
            inject(model, spec)
            load_adapter(model, self.adapter)
        model.eval()
        return model


def run_config(weights: Path) -> Config | None:
    """The configuration of the run that a checkpoint belongs to: run/config.yaml, run/checkpoints/NAME."""
    file = weights.parent.parent / "config.yaml"
    if weights.parent.name != "checkpoints" or not file.is_file():
        return None
    return configuration.load(file)


def _from_file(file: Path, tokenizer: Tokenizer) -> Template:
    """The chat format of a jinja file; the tokenizer tells others of it as its own."""
    try:
        source = file.read_text(encoding="utf-8")
        template = Template(tokenizer, "own", OwnTemplate(tokenizer, source))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template {file} cannot be read ({error})") from error
    except CheckpointError as error:
        problem = str(error).removeprefix(f"{tokenizer.folder}: ")
        raise ConfigError(f"the chat template {file}: {problem}") from error
    tokenizer.chat_template = source
    return template

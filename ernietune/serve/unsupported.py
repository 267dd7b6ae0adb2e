"""Request fields that are refused, because ignoring them would change the answer without a word."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

from ernietune.errors import RequestError

Accepted = dict[str, tuple[object, ...]]
# Fields that wait for an engine that has them, with the values that ask for nothing. A field moves from here
# to `SamplingFields` and into `SamplingFields.sampling`.
NEEDS_ENGINE: Accepted = {
    "prompt_logprobs": (False,),
    "response_max_tokens": (),
    "structural_tag": (),
    "logits_processors_args": ({},),
}
# Fields that would change the answer and that nobody plans to support.
REFUSED: Accepted = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "prompt_token_ids": (),
    "return_token_ids": (False,),
    "suffix": ("",),
    "completion_token_ids": (),
    "disable_chat_template": (False,),
    "documents": ([],),
    "include_draft_logprobs": (False,),
    "return_prompt_text": (False,),
    "skip_special_tokens": (True,),
    "temp_scaled_logprobs": (False,),
    "top_p_normalized_logprobs": (False,),
    "use_beam_search": (False,),
    "truncate_prompt_tokens": (),
    "mm_processor_kwargs": ({},),
}
UNSUPPORTED = NEEDS_ENGINE | REFUSED
# These change no answer.
HARMLESS = frozenset(
    (
        *("user", "store", "service_tier", "mm_hashes", "collect_metrics", "max_streaming_response_tokens"),
        "models",  # other models to ask where this one is missing: it is not
    )
)
_NEAR = 0.8  # how alike a name has to be to one of ours to be taken for a slip


class UnsupportedField(RequestError):
    """A request asks for something that this server cannot do; `field` names it."""

    def __init__(self, field: str, value: object, advice: str = "leave the field out") -> None:
        shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."
        super().__init__(f"{field}={shown} is not supported by this server; {advice}")
        self.field = field


def check_extras(
    extras: Mapping[str, object], fields: Collection[str], elsewhere: Collection[str]
) -> list[str]:
    """Names of the fields that nobody knows; UnsupportedField for those that were meant to have an effect.

    `fields` are those of the request, `elsewhere` those of the other route's requests.
    """
    unknown = []
    for name, value in extras.items():
        if value is None or name in HARMLESS:
            continue
        if name in UNSUPPORTED:
            if value not in UNSUPPORTED[name]:
                raise UnsupportedField(name, value)
        elif name in elsewhere:
            if value is not False:
                raise UnsupportedField(
                    name, value, "it belongs to requests of the other kind, chat or prompt"
                )
        elif near := _nearest(name, [*fields, *UNSUPPORTED]):
            raise UnsupportedField(name, value, f"did you mean {near!r}?")
        else:
            unknown.append(name)
    return unknown


def _nearest(name: str, known: Sequence[str]) -> str | None:
    plain = name.lower().replace("-", "_")
    return next(iter(difflib.get_close_matches(plain, known, 1, _NEAR)), None)

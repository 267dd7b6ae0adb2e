"""A web page to talk to one model, or to two side by side; it asks servers of OpenAI's API."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request, Response

from ernietune.errors import MissingPackage, RequestError
from ernietune.serve.agent import Speaker
from ernietune.serve.panel import Answering, Panel
from ernietune.serve.race import race
from ernietune.serve.sockets import address, listen
from ernietune.serve.tools import Toolbox
from ernietune.serve.uploads import kind_of
from ernietune.serve.wire import RemoteSpeaker, model_cards
from ernietune.text.messages import Conversation, Message, Part

if TYPE_CHECKING:
    import gradio

    from ernietune.serve.service import Service

_SHUTDOWN_SECONDS = 2
_VISITORS = 16  # answers that the page waits for at the same time
_THINKING = {"auto": None, "on": True, "off": False}
_UPLOADS = ("image", "video")  # what a `Part` carries beside text
# The page may load what this server has, and nothing from anywhere else.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
_NOBODY = "—"
# Sharing would send a picture to another host.
_CSS = "main { padding: 12px 24px !important; } button[aria-label='Share'] { display: none; }"


WORDS = {
    "en": {
        "message": "Type a message; pictures and videos by the paper clip, paste or drop",
        "model": "Model",
        "compare": "Compare with",
        "system": "System prompt",
        "thinking": "Thinking",
        "temperature": "Temperature",
        "top_p": "Top p",
        "max_tokens": "Longest answer in tokens (0: as long as fits)",
        "api_key": "API key of the server",
        "stop": "Stop",
        "clear": "New conversation",
    },
    "zh-CN": {
        "message": "输入消息；可用回形针、粘贴或拖放添加图片和视频",
        "model": "模型",
        "compare": "对比模型",
        "system": "系统提示词",
        "thinking": "思考",
        "temperature": "温度",
        "top_p": "Top p",
        "max_tokens": "回答的最大 token 数（0：由上下文决定）",
        "api_key": "服务器的 API 密钥",
        "stop": "停止",
        "clear": "新对话",
    },
}


@dataclass(frozen=True)
class Offer:
    """A model that the page can ask, and what its prompts may hold."""

    label: str
    url: str
    model: str
    modalities: tuple[str, ...] = ("text", "image")


def offers_of(urls: Sequence[str], api_key: str | None = None) -> list[Offer]:
    """The models of servers, labelled by their names; RequestError where there are none, or no answer."""
    cards = [(url, card) for url in urls for card in model_cards(url, api_key)]
    names = [card["id"] for _, card in cards]
    if not cards:
        raise RequestError(f"{', '.join(urls)}: no model is served there")
    return [
        Offer(
            card["id"] if names.count(card["id"]) == 1 else f"{card['id']} @ {urlsplit(url).netloc}",
            url,
            card["id"],
            tuple(card.get("input_modalities", Offer.modalities)),
        )
        for url, card in cards
    ]


@dataclass(frozen=True)
class Asking:
    """What the controls of the page say: the chosen models and how they are asked."""

    first: str
    second: str | None
    system: str
    thinking: str
    temperature: float
    top_p: float
    max_tokens: int
    api_key: str

    @property
    def labels(self) -> list[str]:
        """The chosen models, one or two."""
        return [label for label in (self.first, self.second) if label]

    def conversation(self, panel: Panel, question: Message, tools: Toolbox) -> Conversation:
        """What a model is asked."""
        start = [Message("system", (Part("text", self.system),))] if self.system.strip() else []
        return Conversation((*start, *panel.messages, question), tools.schemas)


class Page:
    """The page over some models; `offers` is asked again whenever somebody opens it.

    `api_key` is what the page brings to the servers; with `asks_key` its visitors bring their own.
    """

    def __init__(
        self, offers: Callable[[], list[Offer]], tools: Toolbox, api_key: str = "", asks_key: bool = False
    ) -> None:
        self._list_offers, self._tools = offers, tools
        self._key, self._asks_key = api_key, asks_key
        self._offers = {offer.label: offer for offer in offers()}

    def build(self) -> gradio.Blocks:
        """The components and what they do."""
        gr = _gradio()
        words = gr.I18n(**WORDS)
        page = gr.Blocks(analytics_enabled=False, title="ernietune", fill_height=True, fill_width=True)
        with page:
            with gr.Sidebar(width=320):
                controls = self._controls(gr, words)
            with gr.Row(equal_height=True, scale=1):
                chats = [self._chat(gr, number) for number in (0, 1)]
            box = self._box(gr, words)
            with gr.Row():
                stop = gr.Button(words("stop"), size="sm", elem_id="stop")
                clear = gr.Button(words("clear"), size="sm", elem_id="clear")
            panels = [gr.State(Panel()), gr.State(Panel())]
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            asked = box.submit(
                self._answer,
                [box, *panels, *controls],
                [box, *panels, *chats],
                concurrency_limit=_VISITORS,
                **quiet,
            )
            stop.click(None, cancels=[asked], **quiet)
            for forget in (clear.click, *(chat.clear for chat in chats)):
                forget(_forget, None, [*panels, *chats], cancels=[asked], **quiet)
            for chosen in controls[:2]:
                chosen.change(self._choose, controls[:2], chats, **quiet)
            page.load(self._reload, None, controls[:2], **quiet)
        return page

    def _controls(self, gr: Any, words: Any) -> list[Any]:
        """In the order of the fields of Asking."""
        labels = list(self._offers)
        gr.Markdown("### ernietune")
        return [
            gr.Dropdown(labels, value=labels[0], label=words("model"), elem_id="model"),
            gr.Dropdown([(_NOBODY, ""), *labels], value="", label=words("compare"), elem_id="compare"),
            gr.Textbox(label=words("system"), lines=2, elem_id="system"),
            gr.Radio(list(_THINKING), value="auto", label=words("thinking")),
            gr.Slider(0, 2, value=0.95, step=0.05, label=words("temperature"), elem_id="temperature"),
            gr.Slider(0, 1, value=0.7, step=0.05, label=words("top_p")),
            gr.Number(0, label=words("max_tokens"), precision=0, minimum=0),
            gr.Textbox(label=words("api_key"), type="password", visible=self._asks_key),
        ]

    def _chat(self, gr: Any, number: int) -> Any:
        return gr.Chatbot(
            label=next(iter(self._offers)),
            visible=number == 0,
            height="70vh",
            feedback_options=None,
            buttons=[],
            group_consecutive_messages=True,
            elem_id=f"chat{number}",
        )

    def _box(self, gr: Any, words: Any) -> Any:
        """The message, with upload where one of the models takes pictures or videos."""
        accepted = {kind for offer in self._offers.values() for kind in offer.modalities}
        uploads = [kind for kind in _UPLOADS if kind in accepted]
        return gr.MultimodalTextbox(
            placeholder=words("message"),
            show_label=False,
            file_types=uploads,
            sources=["upload"] if uploads else [],
            file_count="multiple",
            autofocus=True,
            elem_id="message",
        )

    def _answer(
        self, message: dict[str, Any], first: Panel, second: Panel, *controls: Any
    ) -> Generator[list[Any], None, None]:
        """Ask all chosen models the same and show their answers as they come."""
        gr = _gradio()
        question = _question(message)
        if not question.parts:
            yield [gr.skip()] * 5
            return
        asking = Asking(*controls)
        answering = [Answering(panel, question) for panel in (first, second)[: len(asking.labels)]]
        runners = [
            (self._speaker(asking, label), asking.conversation(panel, question, self._tools))
            for label, panel in zip(asking.labels, (first, second), strict=False)
        ]
        rest = [second][len(answering) - 1 :]
        with closing(race(runners, self._tools)) as batches:
            for batch in batches:
                for index, piece in batch:
                    answering[index].add(piece)
                panels = [*(side.panel() for side in answering), *rest]
                yield [None, *panels, *(list(panel.bubbles) for panel in panels)]

    def _speaker(self, asking: Asking, label: str) -> Speaker:
        offer = self._offers[label]
        return RemoteSpeaker(
            offer.url,
            _THINKING[asking.thinking],
            asking.api_key or self._key or None,
            model=offer.model,
            temperature=asking.temperature,
            top_p=asking.top_p,
            max_tokens=asking.max_tokens or None,
        )

    def _choose(self, first: str, second: str) -> list[Any]:
        """Each side carries the name of its model; the second is there when it has one."""
        gr = _gradio()
        return [gr.update(label=first), gr.update(label=second, visible=bool(second))]

    def _reload(self) -> list[Any]:
        """The models that are there now."""
        gr = _gradio()
        offers = {offer.label: offer for offer in self._list_offers()}
        self._offers |= offers  # pages that were opened before still ask for theirs
        labels = list(offers)
        return [gr.update(choices=labels), gr.update(choices=[(_NOBODY, ""), *labels])]


def _forget() -> list[Any]:
    return [Panel(), Panel(), [], []]


def _question(message: dict[str, Any]) -> Message:
    """What the box holds: the files first, as a user message has them."""
    media = [Part(kind_of(file) or "image", url=str(file)) for file in message["files"]]
    text = [Part("text", message["text"])] if message["text"].strip() else []
    return Message("user", (*media, *text))


def app_of(page: Page) -> FastAPI:
    """The page as an application of its own, which loads nothing from other hosts."""
    gr = _gradio()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def stay_here(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["Content-Security-Policy"] = _POLICY
        return response

    fonts = ["system-ui", "Noto Sans CJK SC", "sans-serif"]
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        page.build(),
        path="/",
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        i18n=gr.I18n(**WORDS),
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
    )
    return mounted


def page_of(service: Service, url: str, tools: Toolbox) -> FastAPI:
    """The page of a server in this process, which is reached at `url`."""

    def offers() -> list[Offer]:
        return [
            Offer(card["id"], url, card["id"], tuple(card["input_modalities"])) for card in service.cards()
        ]

    # A page with the operator's key would let everybody in.
    return app_of(Page(offers, tools, asks_key=bool(service.settings.api_keys)))


def serve_page(page: Page, host: str, port: int) -> None:
    """Serve the page until interrupted; ConfigError when the port is taken."""
    listener = listen(host, port)
    app = app_of(page)
    print(f"page: {address(host, listener)}", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_SHUTDOWN_SECONDS)
    uvicorn.Server(config).run(sockets=[listener])


def require_gradio() -> None:
    """MissingPackage when the page cannot be made."""
    _gradio()


def _gradio() -> Any:
    """The package, which sends no statistics from here."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise MissingPackage("the web page needs gradio: pip install 'ernietune[ui]'") from error
    return gradio

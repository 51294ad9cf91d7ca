"""The page: what stands where, and what each button does.

Imports gradio, whose annotations tell it what to pass; only `web-demo` imports this module.
"""

from __future__ import annotations

import html
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from xtuner_lite.chat.web.answerer import Answerer
from xtuner_lite.chat.web.asking import ask
from xtuner_lite.chat.web.conversation import Conversation, Side, Turn
from xtuner_lite.chat.web.pictures import box_value, check_pictures, place_picture_box, read_box
from xtuner_lite.chat.web.server import WebPageError
from xtuner_lite.chat.web.settings import place_settings, sampling_of
from xtuner_lite.chat.web.words import WORDS, language_of
from xtuner_lite.images.files import ImageError
from xtuner_lite.models.sampling import Sampling

#: What a handler gives gradio: component -> its new value, for every step.
Steps = Generator[dict[Any, Any], None, None]
#: Longest message in characters: about 5000 tokens of English, more than most prompts need.
MAX_CHARACTERS = 20_000
#: Visitors whose answers are made or waited for at once; the rest wait in gradio's own queue. Each
#: takes one of gradio's 40 threads.
_MAX_WAITING = 32
#: Seconds that uploaded pictures are kept: a conversation about them lasts no longer.
_PICTURES_KEPT_S = 24 * 3600

_CSS = """
.gradio-container {max-width: 1100px !important; width: 100% !important; margin: 0 auto !important}
.gradio-container > main {width: 100%}
#notice p {color: #dc2626; margin: 0; padding: .25rem .5rem; overflow-wrap: anywhere}
footer {display: none !important}
/* gradio's button that would post a picture on a hub */
#chat .download-link + button, #base-chat .download-link + button {display: none !important}
@media (max-width: 640px) {#chat, #base-chat {height: 42vh !important}}
"""


@dataclass(frozen=True)
class PageOptions:
    """What the page starts with.

    Args:
        bot_name: its title.
        subtitle: a line below, such as the model's name; '' for none.
        system: the system message in the settings.
        sampling: the other settings.
        compare: start with the base model beside the fine-tuned one.
        language: 'en', 'zh', or 'auto' for the language of each visitor's browser.
        max_characters: longest message.
    """

    bot_name: str = "xtuner_lite"
    subtitle: str = ""
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    compare: bool = False
    language: str = "auto"
    max_characters: int = MAX_CHARACTERS


class ChatPage:
    """The components of a page and the functions behind its buttons.

    ``blocks`` is the gradio page; it must be served with ``i18n()`` and ``style()``.

    Args:
        answerer: makes the answers.
        options: what the page starts with.

    Raises:
        WebPageError: ``compare`` with a model that has no base to compare with.
    """

    def __init__(self, answerer: Answerer, options: PageOptions | None = None) -> None:
        self.answerer, self.options = answerer, options or PageOptions()
        if self.options.compare and not answerer.has_base:
            why = answerer.no_base_because or "the model has no adapter to switch off"
            raise WebPageError(
                f"the base model cannot be asked beside it: {why}; leave --compare out"
            )
        self._catalogue = gr.I18n(**{**WORDS, "zh-CN": WORDS["zh"], "zh-TW": WORDS["zh"]})
        kept = (_PICTURES_KEPT_S // 24, _PICTURES_KEPT_S) if answerer.reads_images else None
        with gr.Blocks(
            title=self.options.bot_name, analytics_enabled=False, delete_cache=kept
        ) as self.blocks:
            self._place_conversation()
            self.settings = place_settings(self._word, self.options.system, self.options.sampling)
            self._connect()
        self.blocks.queue(max_size=200, default_concurrency_limit=_MAX_WAITING)

    def i18n(self) -> gr.I18n:
        """The words of the page, for the browser to choose from."""
        return self._catalogue

    def style(self) -> dict[str, Any]:
        """Theme and CSS; fonts are the visitor's own, so nothing is fetched."""
        sans = ["system-ui", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC"]
        mono = ["ui-monospace", "Consolas", "monospace"]
        theme = gr.themes.Default(font=[*sans, "sans-serif"], font_mono=mono)
        return {"theme": theme, "css": _CSS}

    def _word(self, key: str) -> Any:
        """A word in the chosen language, or the key that the browser translates."""
        if self.options.language == "auto":
            return self._catalogue(key)
        return WORDS[self.options.language][key]

    def _language(self, request: gr.Request) -> str:
        if self.options.language != "auto":
            return self.options.language
        return language_of(request.headers.get("accept-language"))

    def _place_conversation(self) -> None:
        options = self.options
        self.conversation = gr.State(Conversation())
        subtitle = f"\n{options.subtitle}" if options.subtitle else ""
        gr.Markdown(f"# {html.escape(options.bot_name)}{html.escape(subtitle)}")
        self.compare = gr.Checkbox(
            options.compare, label=self._word("compare"), info=self._word("compare_info"),
            visible=self.answerer.has_base, elem_id="compare",
        )  # fmt: skip
        with gr.Row():
            with gr.Column(min_width=300):
                label = self._word("adapted") if self.answerer.has_adapter else options.bot_name
                self.chat = self._column(label, "chat")
            with gr.Column(min_width=300, visible=options.compare) as self.base_column:
                self.base_chat = self._column(self._word("base"), "base-chat")
        # Not gr.HTML, whose templates are evaluated, which the page's policy forbids.
        self.notice = gr.Markdown("", elem_id="notice")
        with gr.Row():
            self.box = self._place_box()
            self.send = gr.Button(
                self._word("send"), variant="primary", scale=1, min_width=90, elem_id="send"
            )
            self.stop = gr.Button(
                self._word("stop"), variant="stop", scale=1, min_width=90, elem_id="stop",
                visible="hidden",
            )  # fmt: skip
        with gr.Row():
            self.retry = gr.Button(self._word("retry"), size="sm", min_width=90, elem_id="retry")
            self.clear = gr.Button(self._word("clear"), size="sm", min_width=90, elem_id="clear")

    def _place_box(self) -> gr.Textbox | gr.MultimodalTextbox:
        if self.answerer.reads_images:
            return place_picture_box(self._word("ask_pictures"))
        return gr.Textbox(
            placeholder=self._word("ask"), show_label=False, container=False, lines=1,
            max_lines=8, scale=8, min_width=180, autofocus=True, elem_id="question",
        )  # fmt: skip

    def _column(self, label: Any, name: str) -> gr.Chatbot:
        # gradio sanitises the HTML in messages: scripts and handlers are taken out, tags it does
        # not know (<think>) are shown as text.
        return gr.Chatbot(
            label=label, height="55vh", min_height=240, elem_id=name, buttons=["copy"],
            feedback_options=None, sanitize_html=True, allow_tags=True, layout="bubble",
        )  # fmt: skip

    def _connect(self) -> None:
        shown = [
            self.box, self.chat, self.base_chat, self.notice, self.send, self.stop, self.retry,
            self.clear,
        ]  # fmt: skip
        given = [self.conversation, self.compare, *self.settings]
        # "multiple": an Enter while an answer comes is told, not lost.
        common = {
            "outputs": shown, "show_progress": "hidden", "trigger_mode": "multiple",
            "concurrency_id": "answer", "concurrency_limit": _MAX_WAITING,
        }  # fmt: skip
        gr.on(
            [self.box.submit, self.send.click], self.on_ask, [self.box, *given], api_name="ask",
            **common,
        )  # fmt: skip
        self.retry.click(self.on_retry, given, api_name="retry", **common)
        self.stop.click(self.on_stop, self.conversation, None, queue=False, api_name="stop")
        # The columns' own bins empty what is shown; what is remembered must go with it.
        gr.on(
            [self.clear.click, self.chat.clear, self.base_chat.clear], self.on_clear,
            self.conversation, shown, queue=False, show_progress="hidden",
            api_name="clear",
        )  # fmt: skip
        self.compare.change(
            lambda wanted: gr.update(visible=wanted), self.compare, self.base_column, queue=False,
            show_progress="hidden", api_name=False,
        )  # fmt: skip

    def on_ask(
        self,
        request: gr.Request,
        given: Any,
        conversation: Conversation,
        compare: bool,
        *settings: Any,
    ) -> Steps:
        """Sends what is in the input."""
        text, pictures = read_box(given)
        if text.strip() or pictures:
            turn = Turn(text, tuple(pictures))
            yield from self._answer(request, turn, conversation, compare, settings)

    def on_retry(
        self, request: gr.Request, conversation: Conversation, compare: bool, *settings: Any
    ) -> Steps:
        """Asks the last question again."""
        if not conversation.turns:
            yield self._said(WORDS[self._language(request)]["nothing_to_retry"])
            return
        turn = conversation.turns[-1]
        yield from self._answer(request, turn, conversation, compare, settings, is_retry=True)

    async def on_stop(self, conversation: Conversation) -> None:
        """Ends the answer that is being made; the piece of it that is there stays."""
        conversation.should_stop.set()

    async def on_clear(self, request: gr.Request, conversation: Conversation) -> dict[Any, Any]:
        """Forgets the conversation."""
        if conversation.is_answering:
            return self._said(WORDS[self._language(request)]["busy"])
        conversation.turns = []
        return {**self._said(""), self.chat: [], self.base_chat: []}

    def _answer(
        self,
        request: gr.Request,
        asked: Turn,
        conversation: Conversation,
        compare: bool,
        settings: Sequence[Any],
        *,
        is_retry: bool = False,
    ) -> Steps:
        language = self._language(request)
        words, limit = WORDS[language], self.options.max_characters
        system, *numbers = settings
        for given in (asked.question, system):
            if len(given) > limit:
                yield self._said(words["too_long"].format(length=len(given), limit=limit))
                return
        if conversation.is_answering:
            yield self._said(words["busy"])
            return
        try:
            check_pictures(asked.pictures)
            sampling = sampling_of(*numbers)
        except ImageError as error:
            yield self._said(words["bad_picture"].format(error=error))
            return
        except (TypeError, ValueError) as error:
            yield self._said(words["bad_settings"].format(error=error))
            return
        sides: tuple[Side, ...] = ("model", "base") if compare else ("model",)
        steps = ask(
            self.answerer, conversation, asked.question, sampling, pictures=asked.pictures,
            sides=sides, system=system, language=language, is_retry=is_retry,
        )  # fmt: skip
        started = self._buttons(answering=True)
        if not is_retry:
            started[self.box] = self._box_of("")
        notice = None
        for step in steps:
            shown = started | self._columns(conversation)
            if step.notice != notice:  # else what was said meanwhile stays
                shown |= self._said(step.notice)
                notice = step.notice
            if step.question is not None:
                shown[self.box] = self._box_of(step.question, asked.pictures)
            yield shown
            started = {}
        yield self._buttons(answering=False)

    def _box_of(self, text: str, pictures: Sequence[str] = ()) -> Any:
        return box_value(text, pictures, takes_pictures=self.answerer.reads_images)

    def _columns(self, conversation: Conversation) -> dict[Any, Any]:
        return {self.chat: conversation.shown("model"), self.base_chat: conversation.shown("base")}

    def _buttons(self, *, answering: bool) -> dict[Any, Any]:
        return {
            # "hidden", not False: what is not in the page yet may miss a change that comes soon.
            self.send: gr.update(visible="hidden" if answering else True),
            self.stop: gr.update(visible=True if answering else "hidden"),
            self.retry: gr.update(interactive=not answering),
            self.clear: gr.update(interactive=not answering),
        }

    def _said(self, notice: str) -> dict[Any, Any]:
        line = " ".join(html.escape(notice).split())  # an empty line would end the HTML
        text = f"<p role='alert'>{line}</p>" if notice else ""
        return {self.notice: text}

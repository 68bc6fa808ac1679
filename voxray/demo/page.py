"""The demo's page: the request on the left, the answers on the right."""

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Default

from voxray.config.demo import DemoSettings
from voxray.demo.answers import AnswerError, DemoAnswer, DemoModel, DemoRequest

STYLE = Path(__file__).parent / "page.css"
LANGUAGES = {
    "": "Automatic",
    "ko": "Korean",
    "en": "English",
    "zh": "Chinese",
    "nl": "Dutch",
    "fr": "French",
    "de": "German",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "pt": "Portuguese",
    "es": "Spanish",
}
"""Choices of the list on the page, which also accepts any other code or name."""
MAX_CHECK_SEC = 60
"""Longest time between two deletions of expired clips."""
BUTTON_CAPTION_JS = "question => (question || '').trim() ? 'Ask' : 'Transcribe'"


def build_page(answering: DemoModel, settings: DemoSettings, example: str) -> gr.Blocks:
    """Build the page for the tasks of a model.

    Args:
        example: An example clip; without one the page has no button for it.
    """
    blocks = gr.Blocks(
        title=f"voxray: {answering.base_name}",
        analytics_enabled=False,
        delete_cache=(min(MAX_CHECK_SEC, settings.keep_sec), settings.keep_sec),
    )
    with blocks:
        gr.HTML(_header(answering))
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                inputs, buttons = _inputs(answering, settings, example)
            with gr.Column(scale=6, min_width=320):
                status = gr.HTML(visible=False, elem_id="status")
                with gr.Row(equal_height=False):
                    base = _side("Base model", "base", visible=answering.has_base)
                    tuned = _side("With the adapter" if answering.has_base else "Answer", "tuned")
        gr.HTML(_footer(settings), elem_id="footer")
        gr.on(
            buttons,
            _make_handler(answering, settings.max_new_tokens),
            inputs,
            [status, *base, *tuned],
            concurrency_limit=settings.concurrency,
            api_visibility="private",
            show_progress_on=[base[1], tuned[1]],
        )
    return blocks.queue(max_size=settings.queue_size, api_open=False)


def theme_options() -> dict[str, Any]:
    """Theme and style as arguments of ``gr.mount_gradio_app``. Only system fonts are used, so none is downloaded."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans KR", "NanumGothic", "sans-serif")
    theme = Default(
        primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=("ui-monospace", "monospace"), radius_size="lg"
    ).set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        block_shadow="none",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )
    return {"theme": theme, "css_paths": [STYLE]}


def _inputs(answering: DemoModel, settings: DemoSettings, example: str) -> tuple[list[Any], list[Any]]:
    """The input components, and the events that submit them."""
    question_tasks = {"sqa", "tqa"} & set(answering.tasks)
    audio = gr.Audio(
        sources=["upload", "microphone"],
        type="filepath",
        label="Clip",
        buttons=[],
        waveform_options=gr.WaveformOptions(waveform_color="#94a3b8", waveform_progress_color="#0d9488"),
        elem_id="clip",
    )
    if example:
        example_button = gr.Button("Take an example", size="sm", variant="secondary", elem_id="example")
        example_button.click(lambda: example, None, audio, api_visibility="private", show_progress="hidden")
    question = gr.Textbox(
        label="Question",
        placeholder="leave it empty for a transcript",
        info="About the clip, or by itself" if "tqa" in question_tasks else "About the clip",
        visible=bool(question_tasks),
        elem_id="question",
    )
    language = gr.Dropdown(
        [(f"{name} ({code})" if code else name, code) for code, name in LANGUAGES.items()],
        value=settings.language,
        label="Language of the clip",
        info="Any other code or English name can be typed in",
        allow_custom_value=True,
        elem_id="language",
    )
    with gr.Accordion("Score the answer", open=False, elem_id="scoring"):
        label = "What was really said" + (", or the right answer" if question_tasks else "")
        reference = gr.Textbox(label=label, lines=2, elem_id="reference")
    compare = gr.Checkbox(True, label="Compare with the base model", visible=answering.has_base, elem_id="compare")
    button = gr.Button("Transcribe", variant="primary", size="lg", elem_id="run")
    question.change(None, question, button, js=BUTTON_CAPTION_JS)
    return [audio, question, language, reference, compare], [button.click, question.submit]


def _side(label: str, name: str, *, visible: bool = True) -> list[Any]:
    """The column of one model's answer, with its text and its facts."""
    with gr.Column(min_width=240, visible=visible, elem_id=name) as column:
        text = gr.Textbox(label=label, lines=3, interactive=False, buttons=["copy"], elem_id=f"{name}-text")
        facts = gr.HTML(elem_id=f"{name}-facts")
    return [column, text, facts]


def _make_handler(answering: DemoModel, max_new_tokens: int) -> Callable[..., Iterator[list[Any]]]:
    """The event handler of the button: yields the page's outputs after every answer."""

    def handle(path: str | None, question: str, language: str | None, reference: str, compare: bool) -> Iterator[Any]:
        request = DemoRequest(path or "", question or "", language or "", reference or "", compare)
        show_base = compare and answering.has_base
        base, tuned = ["", ""], ["", ""]

        def outputs(message: str = "") -> list[Any]:
            status = gr.HTML(f'<p role="alert">{escape(message)}</p>', visible=bool(message))
            return [status, gr.Column(visible=show_base), *base, gr.Column(), *tuned]

        try:
            for answer in answering.answers(request):
                side = base if answer.is_base else tuned
                side[:] = [answer.text, _facts(answer, max_new_tokens)]
                yield outputs()
        except AnswerError as error:
            yield outputs(str(error))

    return handle


def _facts(answer: DemoAnswer, max_new_tokens: int) -> str:
    """Times and length of an answer, its metrics and notes, as HTML."""
    figures = {"tokens": str(answer.num_tokens), "time": f"{answer.sec:.2f} s"}
    if answer.audio_sec:
        figures = {"audio": f"{answer.audio_sec:.1f} s", **figures, "RTFx": f"{answer.rtfx:.1f}"}
    scores = {name: f"{value:.3f}" for name, value in answer.metrics.items()}
    notes = []
    if answer.hit_max:
        notes.append(f"cut off at {max_new_tokens} tokens")
    if answer.num_chunks > 1:
        notes.append(f"too long for the model as a whole: answered in {answer.num_chunks} chunks")
    if not answer.text:
        notes.append("the answer is empty: the model heard nothing to write down")
    below = _cells(scores, "facts scores") if scores else ""
    return _cells(figures, "facts") + below + "".join(f'<p class="note">{note}</p>' for note in notes)


def _cells(figures: dict[str, str], kind: str) -> str:
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items())
    return f'<dl class="{kind}">{cells}</dl>'


def _header(answering: DemoModel) -> str:
    names = f"<b>{escape(answering.base_name)}</b>"
    if answering.adapter_name:
        names += f" with <b>{escape(answering.adapter_name)}</b>"
    if answering.adapter_name and not answering.has_base:
        names += ", which are fully tuned weights: there is no base to compare with"
    return f'<header class="top"><h1>voxray</h1><p>{names}</p></header>'


def _footer(settings: DemoSettings) -> str:
    return (
        f"<p>Clips up to {_minutes(settings.max_audio_sec)} and {settings.max_upload_mib:g} MiB. They stay on the "
        f"machine that runs this page, and are deleted after {_minutes(settings.keep_sec)}. RTFx: seconds of audio "
        "answered in a second, decoding included.</p>"
    )


def _minutes(sec: float) -> str:
    return f"{sec / 60:g} min" if sec >= 60 and sec % 60 == 0 else f"{sec:g} s"

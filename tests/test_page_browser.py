"""The page in a real Chromium, on the real server: typed, streamed, hostile text shown as text, nothing asked elsewhere."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from chromium import PROGRAM, Browser
from conftest import SHARED, WORDS, chat_row, needs_shared, save_folder, tiny_config, write_jsonl
from tunesmith.config.data_keys import DataSection
from tunesmith.config.schema import ModelSection
from tunesmith.data.labelling import label_rows
from tunesmith.generation.speaker import load_speaker
from tunesmith.model.bpe import train_tokenizer
from tunesmith.runfolder import RunFolder
from tunesmith.sources.read import RawRow

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
from tunesmith.serve.app import create_app  # noqa: E402
from tunesmith.serve.runs import ServedRun, find_runs  # noqa: E402
from tunesmith.serve.settings import ServeSettings  # noqa: E402

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")

EVIL = "# Title\n<img src=x onerror=alert(1)> **bold** `code` [link](javascript:alert(3)) <script>alert(2)</script>"
IDLE = "document.querySelector('.card') && !document.querySelector('.running') && document.querySelector('.card footer button')"


@dataclass(frozen=True)
class Served:
    url: str
    app: Any
    speaker: Any
    run: RunFolder
    browser: Browser


def train(folder: Path, name: str, model: Path, rows: list[Any], steps: int, **sections: Any) -> Path:
    data = write_jsonl(folder / f"{name} data <b>.jsonl", rows)
    tunesmith.train(
        model={"path": str(model)},
        data={"train": [str(data)], "max_refused": 0.5, "share_prefix": "off"},
        train={"output_dir": str(folder / name), "max_steps": steps, "log_steps": 1, "micro_batch_tokens": 512},
        **sections,
    )
    return folder / name


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model that replies with markup, and an adapter on it; names, rows and files have markup too."""
    folder = tmp_path_factory.mktemp("browser")
    tokenizer = train_tokenizer([WORDS, EVIL] * 20, vocab_size=500)
    base = save_folder(
        folder / "base", tiny_config("qwen3", vocab_size=500, hidden_size=64, initializer_range=0.02), tokenizer
    )
    rows = [chat_row("hello", EVIL)] * 16 + [chat_row("Who are you?", "I am a small model.")] * 16
    tuned = train(
        folder, "full <i>y", base, [*rows, chat_row(EVIL, "the fox"), chat_row("And?", "")], 130, optim={"lr": 3e-3}
    )
    lora = train(folder, "<img src=x onerror=alert(4)>", tuned, rows, 3, optim={"lr": 1e-6}, lora={"kind": "lora"})
    runs = find_runs([str(tuned), str(lora)])
    speaker = load_speaker(ModelSection(path=str(lora)))
    with serving(speaker, runs) as (url, app):
        browser = Browser(folder / "profile")
        try:
            yield Served(url, app, speaker, runs[0].folder, browser)
        finally:
            browser.close()


@contextmanager
def serving(speaker: Any, runs: Sequence[ServedRun] = (), api_key: str | None = None) -> Iterator[tuple[str, Any]]:
    """The address of a server for a model, and its application."""
    app = create_app(speaker, "tuned", ServeSettings(api_key=api_key), runs)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/", app
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def page(served: Served) -> Iterator[Browser]:
    """The page as a new visitor finds it. Afterwards: no problem on the console, and no request to anywhere else."""
    browser = served.browser
    browser.problems.clear()
    browser.requests.clear()
    browser.resize(1280, 900)
    browser.open(served.url + "static/icon.svg")  # of the same origin, so that what earlier tests stored can be removed
    browser.wait("document.documentElement.tagName == 'svg'")
    greedy = json.dumps({"sampling": {"temperature": 0}})
    browser.run(
        f"localStorage.clear(), sessionStorage.clear(), localStorage.setItem('tunesmith.settings', {json.dumps(greedy)})"
    )
    browser.open(served.url)
    browser.wait("document.querySelectorAll('#models .chip').length == 2")
    yield browser
    assert browser.problems == [], browser.run("document.body.innerText")
    assert [url for url in browser.requests if not url.startswith((served.url, "about:", "blob:"))] == []


def ask(page: Browser, text: str) -> None:
    page.click("#input")
    page.type(text)
    page.enter()
    page.wait(IDLE)


def set_number(page: Browser, name: str, value: float) -> None:
    page.run(
        f"(() => {{ const field = document.querySelector('input[data-setting={name}]'); field.value = {value}; field.dispatchEvent(new Event('input')) }})()"
    )


def require_harmless(page: Browser) -> None:
    """No element that outside text could have made."""
    made = "document.querySelectorAll('main img, main script, main iframe, main i:not(.meter i), main u, main [onerror], a[href^=javascript]').length"
    assert page.run(made) == 0


def test_a_reply_streams_and_its_markup_stays_text(page: Browser) -> None:
    page.run(
        "(() => { globalThis.sizes = new Set(); new MutationObserver(() => sizes.add(document.querySelector('.steps')?.textContent.length))"
        ".observe(document.getElementById('thread'), {childList: true, subtree: true, characterData: true}) })()"
    )
    page.run("document.querySelectorAll('#models .chip')[1].click()")
    page.run("document.querySelectorAll('#models .chip')[0].click()")  # the base alone, whose reply is known
    slow = {"offline": False, "latency": 0, "uploadThroughput": -1}  # so that the reply does not arrive within a frame
    page.call("Network.emulateNetworkConditions", downloadThroughput=20_000, **slow)
    ask(page, "hello")
    page.call("Network.emulateNetworkConditions", downloadThroughput=-1, **slow)
    text = page.run("document.querySelector('.steps').textContent")
    assert text == "Title<img src=x onerror=alert(1)> bold code [link](javascript:alert(3)) <script>alert(2)</script>"
    assert page.run(
        "[...document.querySelectorAll('.markdown h2, .markdown strong, .markdown code')].map((node) => node.textContent)"
    ) == ["Title", "bold", "code"]
    assert page.run("sizes.size") > 3
    assert "seed" in page.run("document.querySelector('.stats').textContent")
    require_harmless(page)
    ask(page, "Who are you?")
    assert page.run("[...document.querySelectorAll('.steps')].at(-1).textContent") == "I am a small model."


def test_models_answer_side_by_side_with_the_probabilities_of_their_tokens(page: Browser, served: Served) -> None:
    names = page.run("[...document.querySelectorAll('#models .chip')].map((chip) => chip.textContent)")
    assert names == list(served.app.state.serving.models)
    page.run("document.querySelectorAll('#models .chip')[1].click()")
    page.click("#open-settings")
    page.run("document.querySelector('[data-setting=showTokens]').click()")
    ask(page, "Who are you?")
    page.wait("document.querySelectorAll('.card').length == 2 && document.querySelectorAll('.tokens').length == 2")
    texts = page.run(
        "[...document.querySelectorAll('.tokens')].map((node) => [...node.children].map((token) => token.token.text).join(''))"
    )
    assert [text.removesuffix("<|im_end|>") for text in texts] == ["I am a small model."] * 2
    page.point_at(".tokens span:nth-child(2)")
    page.wait("!document.getElementById('tip').hidden")
    token = page.run("document.querySelector('.tokens span:nth-child(2)').token")
    assert len(token["others"]) == 5
    assert token["p"] == max(one["p"] for one in token["others"]) > 0.5
    assert sum(one["p"] for one in token["others"]) <= 1.0001
    require_harmless(page)
    parts = page.run(
        """(async () => {
          const { readToken } = await import("/static/tokens.js");
          const decoder = new TextDecoder();
          const bytes = [...new TextEncoder().encode("猫")];
          const read = (token, bytes) => readToken({ token, bytes, logprob: 0, top_logprobs: [] }, decoder);
          return [read("\ufffd", bytes.slice(0, 2)), read("\ufffd", bytes.slice(2)), read("a", [97])].map((token) => [token.shown, token.text]);
        })()"""
    )
    assert parts == [["·", "⟨e7 8c⟩"], ["猫", "⟨ab⟩"], ["a", "a"]]


def test_stopping_frees_the_row(page: Browser, served: Served) -> None:
    page.click("#open-settings")
    set_number(page, "temperature", 2)
    set_number(page, "repetition_penalty", 2)
    for _ in range(8):  # a stop token may be drawn early
        page.click("#input")
        page.type("fox")
        page.enter()
        page.wait("document.querySelector('.running .markdown') || !document.querySelector('.running')")
        page.press("Escape", 27)
        page.wait("!document.querySelector('.running')")
        if page.run("document.querySelector('.card:last-child .note')?.textContent") == "Stopped":
            break
    else:
        pytest.fail("no reply was long enough to be stopped")
    end = time.monotonic() + 5
    while served.app.state.serving.worker.num_running and time.monotonic() < end:
        time.sleep(0.02)
    assert served.app.state.serving.worker.num_running == 0


def test_turns_are_edited_corrected_and_saved_as_a_training_row(page: Browser, served: Served) -> None:
    page.click("#open-settings")
    page.run(
        "(() => { const area = document.querySelector('[data-setting=system]'); area.value = 'be small'; area.dispatchEvent(new Event('input')) })()"
    )
    page.click("#open-settings")
    ask(page, "hello")
    ask(page, "Who are you?")
    page.run("document.querySelector('.said .actions button').click()")
    page.wait("document.querySelector('textarea.edit')")
    page.run("document.querySelector('textarea.edit').select()")
    page.type(EVIL)
    page.enter()
    page.wait(f"document.querySelectorAll('.turn').length == 1 && {IDLE}")
    assert page.run("document.querySelector('.bubble').textContent") == EVIL
    page.run(
        "[...document.querySelectorAll('.card footer button')].find((button) => button.title == 'Correct this reply').click()"
    )
    page.run("document.querySelector('.card textarea.edit').select()")
    page.type("Corrected: 你好 <u>")
    page.run("document.querySelector('.card button.main').click()")
    require_harmless(page)
    page.open(served.url + "?again")  # the conversation is still there
    page.wait("document.querySelectorAll('.turn').length == 1")
    page.click("#export")
    page.run("document.querySelector('#dialog button.main').click()")
    row = json.loads(json.loads(page.run("localStorage.getItem('tunesmith.rows')"))[0])
    assert row == {
        "messages": [
            {"role": "system", "content": "be small"},
            {"role": "user", "content": EVIL},
            {"role": "assistant", "content": "Corrected: 你好 <u>"},
        ]
    }
    labelled = next(label_rows([RawRow("x", 1, row)], served.speaker.encoder, DataSection(train=["x"]), 512))
    assert (labelled.status, labelled.notes) == ("used", ())
    page.press("Escape", 27)


def test_curves_grow_and_rows_are_marked(page: Browser, served: Served) -> None:
    metrics = served.run.metrics
    with metrics.open("a") as file:  # the run goes on
        file.write('{"step": 131, "epoch": 9.0, "loss": 0.05, "lr": 0.001, "grad_norm": 0.1}\n')
    page.click("#tabs [data-view=runs]")
    page.wait("document.querySelectorAll('.chart').length >= 3")
    assert page.run("document.querySelector('.live') != null")
    page.point_at(".chart svg")
    page.wait("document.querySelector('.chart output').textContent.includes('loss')")
    with metrics.open("a") as file:
        file.write('{"step": 132, "epoch": 9.1, "loss": 0.04, "lr": 0.000123, "grad_norm": 0.1}\n')
    page.wait(
        "[...document.querySelectorAll('.chart figcaption')].some((node) => node.textContent.includes('0.000123'))"
    )
    require_harmless(page)
    page.click("#tabs [data-view=data]")
    page.wait("document.querySelectorAll('.sample').length == 10")
    page.run("location.hash = document.querySelectorAll('#data .pager a')[0].hash")
    page.wait("document.querySelector('.pager span:not(.button)').textContent.startsWith('11')")
    page.run("location.hash += '/'; location.hash = location.hash.replace(/used.*/, 'used/30')")
    page.wait("document.querySelectorAll('.sample').length == 3")
    last = "[...document.querySelectorAll('.sample')].at(-1)"
    assert EVIL in page.run(f"{last}.querySelector('.turn-of.user pre').textContent")
    assert page.run(f"{last}.querySelector('mark').textContent") == "the fox<|im_end|>"
    page.run("location.hash = location.hash.replace(/used.*/, 'refused/0')")
    page.wait("document.querySelector('#data .bad')")
    assert "empty" in page.run("document.querySelector('#data .bad').textContent")
    require_harmless(page)


def test_the_key_is_asked_for_and_kept_in_this_tab_only(served: Served) -> None:
    browser = served.browser
    browser.resize(1280, 900)
    with serving(served.speaker, api_key="sesame-open-123") as (url, _):
        browser.open(url)
        browser.wait("document.getElementById('dialog').open")
        browser.type("wrong")
        browser.enter()
        browser.wait("document.querySelector('#dialog .bad')")
        browser.type("sesame-open-123")
        browser.enter()
        browser.wait("document.querySelectorAll('#models .chip').length == 2")
        ask(browser, "Who are you?")
        browser.wait("document.querySelector('.stats')")
        assert "sesame" not in browser.run(
            "JSON.stringify(localStorage) + document.cookie + location.href + document.body.innerText"
        )
        assert "sesame" in browser.run("sessionStorage.getItem('tunesmith.key')")


def test_every_view_fits_a_phone_in_both_languages_and_schemes(page: Browser, served: Served) -> None:
    ask(page, EVIL + " long-word-" * 4 + "x" * 90)
    page.run("document.querySelectorAll('#models .chip')[1].click()")
    ask(page, "hello")
    for is_dark in (False, True):
        page.resize(390, 844, is_dark)
        for view, seen in (("chat", ".card"), ("runs", ".chart"), ("data", ".sample")):
            page.run(f"location.hash = '{view}'")
            page.wait(f"document.querySelector('#{view}:not([hidden]) {seen}')")
            assert (
                page.run(
                    f"Math.max(document.documentElement.scrollWidth, document.getElementById('{view}').scrollWidth)"
                )
                <= 390
            ), view
        assert page.run("document.getElementById('thread').scrollWidth") <= 390
        page.run("document.getElementById('language').click()")
        page.wait(
            "document.documentElement.lang == 'zh-CN'" if not is_dark else "document.documentElement.lang == 'en'"
        )
    page.run("location.hash = 'chat'")
    page.click("#open-settings")
    assert page.run("document.getElementById('settings').scrollWidth") <= 390


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@needs_shared
@pytest.mark.skipif("TUNESMITH_LONG" not in os.environ, reason="set TUNESMITH_LONG=1 to run it")
def test_a_model_reasons_calls_a_tool_and_goes_on_with_its_result(tmp_path: Path, served: Served) -> None:
    template = SHARED / "templates" / "llamacpp" / "Qwen-Qwen3-0.6B.jinja"
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    called = [
        {"role": "user", "content": "How warm is it in Paris?"},
        {"role": "assistant", "content": "", "reasoning_content": "I need the weather.", "tool_calls": [call]},
    ]
    row = {
        "messages": [
            *called,
            {"role": "tool", "content": "21 degrees"},
            {"role": "assistant", "content": "It is **21** degrees."},
        ],
        "tools": [TOOL],
    }
    tokenizer = train_tokenizer([WORDS, json.dumps(row), template.read_text(encoding="utf-8")] * 9, vocab_size=900)
    base = save_folder(
        tmp_path / "base",
        tiny_config("qwen3", vocab_size=900, hidden_size=64, initializer_range=0.02, max_position_embeddings=2048),
        tokenizer,
    )
    data = write_jsonl(tmp_path / "chats.jsonl", [row] * 8)
    tunesmith.train(
        model={"path": str(base)}, data={"train": [str(data)], "chat_template": str(template), "max_seq_len": 1024},
        train={"output_dir": str(tmp_path / "run"), "max_steps": 150, "micro_batch_tokens": 2048}, optim={"lr": 3e-3},
    )  # fmt: skip
    browser = served.browser
    browser.resize(1280, 900)
    speaker = load_speaker(ModelSection(path=str(tmp_path / "run")))
    with serving(speaker) as (url, _):
        browser.open(url)
        browser.wait("document.querySelectorAll('#models .chip').length == 1")
        browser.click("#open-settings")
        browser.run(
            f"(() => {{ const area = document.querySelector('[data-setting=tools]'); area.value = {json.dumps(json.dumps([TOOL]))}; area.dispatchEvent(new Event('input')) }})()"
        )
        set_number(browser, "temperature", 0)
        ask(browser, "How warm is it in Paris?")
        browser.wait("document.querySelector('.call')")
        assert browser.run("document.querySelector('.reasoning div').textContent.trim()") == "I need the weather."
        assert not browser.run("document.querySelector('.reasoning').open")
        assert browser.run("document.querySelector('.call code').textContent") == "get_weather"
        assert json.loads(browser.run("document.querySelector('.call pre').textContent")) == {"city": "Paris"}
        browser.run("document.querySelector('.results textarea').value = '21 degrees'")
        browser.run("document.querySelector('.results button').click()")
        browser.wait(f"document.querySelectorAll('.step').length == 2 && {IDLE}")
        assert (
            browser.run("[...document.querySelectorAll('.step .markdown')].at(-1).textContent") == "It is 21 degrees."
        )
        browser.click("#export")
        saved = json.loads(browser.run("document.querySelector('.preview').textContent"))
    assert [turn["role"] for turn in saved["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert saved["messages"][1]["tool_calls"][0]["function"] == call["function"]
    assert saved["tools"] == [TOOL]
    labelled = next(label_rows([RawRow("x", 1, saved)], speaker.encoder, DataSection(train=["x"]), 1024))
    assert labelled.status == "used", labelled.reason


PIECES = ["*", "[", "`", "> ", "- ", "|", "#", "_", "~", "![", "](", "[a](", "\\", "**a", "[x](http://a", "`` ` ", "h", "http://", "~~~", "a|b\n-|-\n", "1. ", "``` ", "* * ", "*_", "***", '(http://x "', "\u202e", "```" + " " * 200 + "`"]  # fmt: skip
DOCUMENT = (
    "# T\n\n1. a **b *c* d** `e`\n   - f [g](https://h.example/i_(j)) ~~k~~\n\n> q\n\n```py\nx = '<b>'\n```\n\n| a | b |\n|:-|-:|\n| 1 | `2|` |\n\n"
    "***\nhttps://l.example/m_n. ![o](https://p.example/q.png) \\*r\\*"
)


def test_markdown_is_bounded_and_half_of_it_shows(page: Browser) -> None:
    slow = page.run(
        f"""(async () => {{
          const {{ renderMarkdown }} = await import("/static/markdown.js");
          const slow = [];
          for (const piece of {json.dumps(PIECES)}) {{
            const start = performance.now();
            renderMarkdown(piece.repeat(Math.ceil(30000 / piece.length)));
            if (performance.now() - start > 700) slow.push(piece);
          }}
          return slow;
        }})()"""
    )
    assert slow == []
    shown = page.run(
        f"""(async () => {{
          const {{ renderMarkdown }} = await import("/static/markdown.js");
          const text = {json.dumps(DOCUMENT)};
          for (let end = 0; end < text.length; end += 1) renderMarkdown(text.slice(0, end));
          const whole = renderMarkdown(text);
          const tags = [...whole.querySelectorAll("*")].map((node) => node.tagName.toLowerCase());
          return {{ tags: [...new Set(tags)].sort(), links: [...whole.querySelectorAll("a")].map((link) => [link.href, link.rel]), code: whole.querySelector("pre").textContent }};
        }})()"""
    )
    assert shown["tags"] == sorted(
        [
            "a",
            "blockquote",
            "code",
            "del",
            "div",
            "em",
            "figcaption",
            "figure",
            "h2",
            "hr",
            "li",
            "ol",
            "p",
            "pre",
            "span",
            "strong",
            "table",
            "tbody",
            "td",
            "th",
            "thead",
            "tr",
            "ul",
        ]
    )
    assert [href for href, _ in shown["links"]] == [
        "https://h.example/i_(j)",
        "https://l.example/m_n",
        "https://p.example/q.png",
    ]
    assert {rel for _, rel in shown["links"]} == {"noopener noreferrer nofollow"}
    assert shown["code"] == "x = '<b>'"


def test_events_are_read_in_whatever_pieces_they_come(page: Browser) -> None:
    text = ': comment\r\n\r\ndata: {"a": "é你"}\r\n\r\nevent: x\ndata: one\ndata:two\n\ndata: [DONE]\n\ndata: cut'
    for size in (1, 2, 3, 7, 1000):
        found = page.run(
            f"""(async () => {{
              const {{ readEvents }} = await import("/static/api.js");
              const bytes = new TextEncoder().encode({json.dumps(text)});
              const stream = new ReadableStream({{ start(controller) {{
                for (let at = 0; at < bytes.length; at += {size}) controller.enqueue(bytes.slice(at, at + {size}));
                controller.close();
              }} }});
              const found = [];
              for await (const data of readEvents(stream)) found.push(data);
              return found;
            }})()"""
        )
        assert found == ['{"a": "é你"}', "one\ntwo", "[DONE]"], size

"""The page of `litgpt serve`, in a real browser: on a running server, and on one that answers as a test says."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from litgpt.deploy import page as files
from tests.makers.browser import MISSING, Browser, browsing
from tests.makers.servers import Server, make_served, serving

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
KEY = "k-123"
HEADERS = {"Authorization": f"Bearer {KEY}"}
DONE = "document.querySelector('.answer:last-child:not(.running)')"
TROUBLE = "!document.getElementById('trouble').hidden && document.querySelector('#trouble span').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("served")
    with serving(make_served(home), "--model_name", "tiny", said=home / "said.txt", LITGPT_API_KEY=KEY) as running:
        yield running


class Scripted:
    """A server of the page whose answers a test puts down beforehand.

    An answer is a Response, or the parts of a stream: text, an event, a threading.Event to wait for, an error to break
    the connection with.
    """

    def __init__(self) -> None:
        self.url = ""
        self.answers: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        self.hits = 0  # requests for what no page should ask for
        self.models: Response = JSONResponse({"data": [{"id": "tiny"}, {"id": "french"}]})

    def app(self) -> Starlette:
        async def models(request: Request) -> Response:
            return self.models

        async def chat(request: Request) -> Response:
            self.asked.append(await request.json())
            answer = self.answers.pop(0)
            return (
                answer
                if isinstance(answer, Response)
                else StreamingResponse(stream(answer), media_type="text/event-stream")
            )

        async def canary(request: Request) -> Response:
            self.hits += 1
            return Response()

        routes = [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
        return Starlette(routes=[*files.routes(), *routes, Route("/canary", canary)])

    def will_say(self, *parts: Any, n: int = 9) -> None:
        usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": n}}
        end = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
        self.answers.append([*parts, end, usage, "[DONE]"])

    def will_refuse(self, status: int, message: str = "no", code: str | None = None, **headers: str) -> None:
        self.answers.append(JSONResponse({"error": {"message": message, "code": code}}, status, headers=headers))


async def stream(parts: list[Any]):
    for part in parts:
        if isinstance(part, threading.Event):
            await asyncio.to_thread(part.wait, 20)
        elif isinstance(part, Exception):
            raise part
        elif part == "[DONE]":
            yield b"data: [DONE]\n\n"
        else:
            event = part if isinstance(part, dict) else {"choices": [{"delta": {"content": part}}]}
            yield f"data: {json.dumps(event)}\n\n".encode()


@pytest.fixture(scope="module")
def running_script() -> Iterator[Scripted]:
    scripted = Scripted()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        scripted.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(scripted.app(), log_config=None, timeout_graceful_shutdown=1)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        yield scripted
        running.should_exit = True
        thread.join(10)


def fresh(browser: Browser, url: str, ready: str = "document.getElementById('model').options.length") -> None:
    """The page as who comes for the first time sees it."""
    browser.open(f"{url}/page/page.css")  # the same origin, and no script that still runs
    browser.js("localStorage.clear(); sessionStorage.clear()")
    browser.complaints()
    browser.open(url)
    browser.until(ready)


@pytest.fixture
def scripted(running_script: Scripted, browser: Browser) -> Iterator[Scripted]:
    running_script.answers, running_script.asked, running_script.hits = [], [], 0
    fresh(browser, running_script.url)
    yield running_script
    assert [c for c in browser.complaints() if "Failed to load resource" not in c] == []
    assert running_script.hits == 0


def ask(browser: Browser, text: str, until: str = DONE) -> Any:
    browser.js("document.getElementById('message').focus()")
    browser.type(text)
    browser.press("Enter")
    return browser.until(until)


def said(browser: Browser) -> str:
    return browser.js("return document.querySelector('.answer:last-child .text').innerText")


def status_says(words: str) -> str:
    return f"document.getElementById('status').textContent.includes({json.dumps(words)})"


# ----------------------------------------------------------------------------------------------------------- the server


def test_the_page_is_open_to_all_and_all_that_it_asks_needs_the_key(server):
    found = httpx.get(server.url)
    assert found.headers["Content-Type"] == "text/html; charset=utf-8"
    assert found.headers["X-Content-Type-Options"] == "nosniff"
    assert "frame-ancestors 'none'" in found.headers["Content-Security-Policy"]
    assets = re.findall(r'(?:src|href)="([^"#]+)"', found.text)
    assert [asset for asset in assets if not asset.startswith("data:")] == ["page/page.css", "page/page.js"]
    for path in files.files():
        whole, head = httpx.get(server.url + path), httpx.head(server.url + path)
        assert (whole.status_code, head.status_code, head.content) == (200, 200, b"")
        assert head.headers["Content-Length"] == str(len(whole.content))
        assert KEY not in whole.text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", whole.text)
        assert not re.search(r"(?:src|href|url|import)\W{1,4}(?:https?:)?//", whole.text), "nothing from elsewhere"
        again = httpx.get(server.url + path, headers={"If-None-Match": whole.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert httpx.post(server.url + path, json={}).status_code == 401
        assert httpx.post(server.url + path, json={}, headers=HEADERS).status_code == 405
    assert not set(files.files()) & httpx.get(f"{server.url}/openapi.json", headers=HEADERS).json()["paths"].keys()
    assert f"Serving tiny at {server.url} " in server.said.read_text()
    assert "browser" in server.said.read_text()


def test_predict_may_stand_at_the_path_of_the_page():
    from fastapi import FastAPI

    app = FastAPI()
    app.post("/")(lambda: {"output": "x"})
    app.router.routes += files.routes()

    async def both() -> list[str]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            return [(await client.get("/")).text, (await client.post("/")).text]

    got, posted = asyncio.run(both())
    assert got.startswith("<!doctype html>")
    assert posted == '{"output":"x"}'


def test_a_key_is_asked_for_and_an_answer_streams_and_stops(server, browser):
    fresh(browser, server.url, "document.getElementById('key').open")
    assert browser.js("return document.activeElement.id") == "key-text"
    assert "asks for an API key" in browser.js("return document.getElementById('key-why').textContent")
    browser.type("wrong")
    browser.press("Enter")
    browser.until(
        "document.getElementById('key').open && /not take/.test(document.getElementById('key-why').textContent)"
    )
    browser.type(KEY)
    browser.press("Enter")
    browser.until("document.getElementById('model').value === 'tiny'")
    assert KEY in browser.js("return Object.values(sessionStorage)")
    assert KEY not in browser.js("return JSON.stringify(localStorage) + document.documentElement.outerHTML")

    settings = {"temperature": "1.5", "seed": "3", "max_tokens": "24"}
    browser.js("localStorage.setItem('litgpt.settings', arguments[0])", json.dumps(settings))
    ask(browser, "The mill")
    request = {"messages": [{"role": "user", "content": "The mill"}], "temperature": 1.5, "seed": 3, "max_tokens": 24}
    known = httpx.post(f"{server.url}/v1/chat/completions", json=request, headers=HEADERS, timeout=60).json()
    assert (
        browser.js("return chat().messages[1].content".replace("chat()", CHAT))
        == known["choices"][0]["message"]["content"]
    )
    note = browser.js("return document.querySelector('.answer .note').textContent")
    assert re.fullmatch(r"24 tokens · [\d.]+ tokens/s · prompt \d+ · cut off at the limit", note)

    browser.js("localStorage.setItem('litgpt.settings', '{}')")
    browser.open(server.url)  # the key is still there
    browser.until("document.getElementById('model').value === 'tiny'")
    for _ in range(20):  # a random model may end its answer at once
        browser.press("Alt", "r")
        browser.until("document.querySelector('.answer:last-child .text').textContent")
        browser.press("Escape")
        browser.until(DONE)
        if "stopped by you" in browser.js("return document.querySelector('.answer:last-child .note').textContent"):
            break
    else:
        raise AssertionError("no answer could be stopped")
    server.until(0, "litgpt_rows_in_use", **HEADERS)
    assert server.metrics(**HEADERS)["litgpt_generated_tokens_total"] < 24 + 20 * 400

    browser.js("document.getElementById('message').value = 'the mill '.repeat(2000)")
    browser.press("Enter")
    assert "The conversation is too long" in browser.until(TROUBLE)
    assert [c for c in browser.complaints() if "Failed to load resource" not in c] == []


CHAT = "JSON.parse(localStorage.getItem('litgpt.chat.' + sessionStorage.getItem('litgpt.current')))"

# ------------------------------------------------------------------------------------------------------------- Markdown

RENDERED = {
    "a *b* **c** ***d*** _e_ __f__ ~~g~~ `h*i*`":
        "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <em>e</em> <strong>f</strong> <del>g</del> "
        "<code>h*i*</code></p>",
    "**a *b* c** **x *y***":
        "<p><strong>a <em>b</em> c</strong> <strong>x <em>y</em></strong></p>",
    "a_b_c * d * \\*e\\* **open ``x ` y``":
        "<p>a_b_c * d * *e* **open <code>x ` y</code></p>",
    "# A *b*\n### C ##\ntext\n\n---\n":
        "<h3>A <em>b</em></h3><h5>C</h5><p>text</p><hr>",
    "one\ntwo\n\nthree":
        "<p>one\ntwo</p><p>three</p>",
    "- a\n  - b\n    1. c\n- d\n\n  e\n\nf":
        "<ul><li>a<ul><li>b<ol start=\"1\"><li>c</li></ol></li></ul></li><li>d<p>e</p></li></ul><p>f</p>",
    "3. a\n4. b":
        '<ol start="3"><li>a</li><li>b</li></ol>',
    "> a\n> - b\n> > c":
        "<blockquote><p>a</p><ul><li>b</li></ul><blockquote><p>c</p></blockquote></blockquote>",
    "[a *b*](https://c.d/e_(f) \"g\") <https://h.i> see http://j.k/l. <mailto:m@n.o>":
        '<p><a href="https://c.d/e_(f)" rel="noopener noreferrer" target="_blank">a <em>b</em></a> '
        '<a href="https://h.i/" rel="noopener noreferrer" target="_blank">https://h.i</a> see '
        '<a href="http://j.k/l" rel="noopener noreferrer" target="_blank">http://j.k/l</a>. '
        '<a href="mailto:m@n.o" rel="noopener noreferrer" target="_blank">mailto:m@n.o</a></p>',
    "[a](javascript:b) ![c](https://d.e) [f](/v1/models) \\(x_1\\)":
        '<p>[a](javascript:b) ![c](<a href="https://d.e/" rel="noopener noreferrer" target="_blank">https://d.e</a>) '
        "[f](/v1/models) \\(x_1\\)</p>",
    "| a | b |\n|:-:|--:|\n| *c* | `d\\|e` |\n\nf | g":
        '<div class="table" tabindex="0" role="region" aria-label="Table"><table><thead><tr><th class="centre">a</th>'
        '<th class="right">b</th></tr></thead><tbody><tr><td class="centre"><em>c</em></td><td class="right">'
        "<code>d|e</code></td></tr></tbody></table></div><p>f | g</p>",
    "```py\n<b> *x*\n\n  y\n```\nz\n~~~~\n~~~\nopen":
        "{code:py}&lt;b&gt; *x*\n\n  y{/code}<p>z</p>{code:text}~~~\nopen{/code}",
}  # fmt: skip
SHOW = """
    const { Live } = await import("/page/markdown.js");
    const shown = (pieces) => {
      const root = document.createElement("div"), live = new Live(root);
      let text = "";
      for (const piece of pieces) live.show(text += piece);
      root.replaceChildren(...[...root.children].flatMap((part) => [...part.childNodes]));
      return root;
    };
"""


def in_page(browser: Browser, script: str, *arguments: object) -> Any:
    return browser.js(f"return (async (given) => {{ {SHOW} {script} }})(...arguments)", *arguments)


def test_markdown_becomes_elements(scripted, browser):
    found = in_page(browser, "return given.map((text) => shown([text]).innerHTML)", list(RENDERED))
    frame = r'<div class="code"><div class="bar"><span>(\w+)</span><button type="button" class="copy-code">Copy code' \
        r'</button></div><pre tabindex="0"><code>(.*?)</code></pre></div>'  # fmt: skip
    found = [re.sub(frame, r"{code:\1}\2{/code}", html, flags=re.S) for html in found]
    assert dict(zip(RENDERED, found, strict=True)) == RENDERED


def test_a_text_in_pieces_looks_like_the_whole(scripted, browser):
    """Blocks that were shown for good are what they are in the end."""
    rng = random.Random(5)
    parts = [*RENDERED, "- ", "1. ", "> ", "```\n", "~~~", "|", "|-|-|\n", "\n", "\n\n", "  ", "\t", "**", "_",
             "`", "[a](", ")", "word ",
             "# ", "---", "-5", "1.5 ", "\\", "é🦙", "\r\n", "* * *\n", "| a | b |\n"]  # fmt: skip
    texts = ["".join(rng.choice(parts) for _ in range(n)) for n in [*range(2, 32)] * 4 + [400]]
    script = """
        const cut = (text) => text.match(/[^]{1,3}/gu);
        return given.filter((text) => shown(cut(text)).innerHTML !== shown([text]).innerHTML);
    """
    assert in_page(browser, script, texts) == []


FIRE = "fetch('/canary')"
HOSTILE = [
    f"<script>{FIRE}</script>",
    f"<img src=x onerror=\"{FIRE}\"><img src='/canary'>",
    f"<svg/onload={FIRE}><svg><animate onbegin={FIRE} attributeName=x></svg>",
    f"<iframe srcdoc='<script>{FIRE}</script>'></iframe><iframe src=/canary></iframe>",
    "<link rel=stylesheet href=/canary><style>@import '/canary'; * { background: url(/canary) }</style>",
    "<meta http-equiv=refresh content='0;url=/canary'><base href=/canary>",
    f"[a](javascript:{FIRE}) [b](JaVaScRiPt:alert(1)) [c](data:text/html,<script>{FIRE}</script>) [d](vbscript:x)",
    "[a](java\tscript:x) [b](\x01javascript:x) [c](&#106;avascript:x) [d](//canary) [e](blob:x) <javascript:x>",
    "[a]( javascript:x) [b](<javascript:x>) [c](https:javascript:x) [d](\\javascript:x) [e](file:///etc/passwd)",
    "![a](/canary) ![b](http://127.0.0.1/canary) [![c](/canary)](javascript:x)",
    f'[a](https://x.y/"onmouseover="{FIRE}) <https://x.y/"onclick={FIRE}>',
    f"```\"><script>{FIRE}</script>\n</code></pre><script>{FIRE}</script>\n",
    f"~~~ html onload={FIRE}\nnever closed <script>{FIRE}</script>",
    f"| <img src=x onerror={FIRE}> |\n|-|\n| [x](javascript:y) |\n",
    f"- > 1. `<script>{FIRE}</script>",
    "<details open ontoggle=\"x\"><form action=/canary><input autofocus onfocus=x>",
    "<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror=x&gt;\">",
    "<a href=\"javascript:x\">y</a> <template><script>x</script></template> {{7*7}} ${x} &lt;script&gt; \u202e \x00",
    "constructor __proto__ [constructor](https://a.b) `__proto__`\n\n1. [__proto__](mailto:a@b)",
]  # fmt: skip
STRANGE = """
    const blocks = "p h3 h4 h5 h6 ul ol li blockquote hr div pre table thead tbody tr th td";
    const known = new Set(`${blocks} em strong del code a span button`.split(" "));
    const names = new Set("class href rel target start tabindex role aria-label type".split(" "));
    const strange = [];
    for (const node of root.querySelectorAll("*")) {
      const isKnown = known.has(node.localName) && node.getAttributeNames().every((name) => names.has(name));
      const isSafe = node.localName !== "a" || /^(https?|mailto):/.test(node.getAttribute("href"));
      if (!isKnown || !isSafe) strange.push(node.outerHTML);
    }
    return strange;
"""


def test_nothing_in_an_answer_runs_or_loads(scripted, browser):
    whole = "\n\n".join(sorted(HOSTILE, key=lambda text: "never closed" in text))
    for pieces in (HOSTILE, [whole[i : i + 7] for i in range(0, len(whole), 7)]):
        scripted.will_say(*pieces)
        ask(browser, f"<img src=/canary onerror={FIRE}>")
        assert browser.js(f"const root = document.querySelector('.answer:last-child .text'); {STRANGE}") == []
    scripted.will_say("x")
    ask(browser, "[a](javascript:b) **c**")
    assert browser.js("return document.querySelectorAll('.user .text *').length") == 0
    for each in HOSTILE:
        assert in_page(browser, f"const root = shown([given]); {STRANGE}", each) == []
    image = "<img src=/canary>"
    stored = {
        "id": "evil",
        "title": image,
        "changed": 1,
        "messages": [{"role": "assistant", "content": image, "model": image}],
    }
    for key, value in (("chat.evil", json.dumps(stored)), ("chat.broken", '{"id": 1'), ("settings", "[7")):
        browser.js("localStorage.setItem('litgpt.' + arguments[0], arguments[1])", key, value)
    browser.open(scripted.url)
    browser.until("document.getElementById('model').options.length")
    browser.js("document.querySelector('#list li:last-child .chat').click()")
    assert browser.js("return document.querySelectorAll('img, script:not([src])').length") == 0


def test_the_policy_forbids_what_the_page_does_not_do(scripted, browser):
    for attempt in (
        "document.body.innerHTML = '<img src=/canary>'",
        "const s = document.createElement('script'); s.append('window.fired = 1'); document.body.append(s)",
        "const b = document.createElement('button'); b.setAttribute('onclick', 'window.fired = 1'); b.click()",
        "const i = document.createElement('img'); i.src = '/canary'; document.body.append(i)",
        "document.body.append(Object.assign(document.createElement('iframe'), {src: '/canary'}))",
    ):
        browser.js(f"try {{ {attempt} }} catch {{}}")
        assert browser.complaints(), attempt
    assert browser.js("return window.fired ?? null") is None


def test_very_long_answers_come_through(scripted, browser):
    block = "A paragraph with *some* marks, and `code`.\n\n```c\nint x = 0;\n```\n\n- item\n\n"
    text = block * (1_000_000 // len(block))
    scripted.will_say(*[text[i : i + 20_000] for i in range(0, len(text), 20_000)])
    ask(browser, "long", f"{DONE}?.querySelectorAll('.text p').length === {len(text) // len(block)}")
    assert browser.js(f"return {CHAT}.messages[1].content.length") == len(text)
    n = 50_000  # what would take minutes if each mark looked through all that follows
    for text in (
        "[" * n,
        "*a " * n,
        "*a" * n + "a*" * n,
        "`a" * n,
        "[a](" * n,
        ">" * n,
        "- " * n,
        "_" * n,
        "|a" * n,
        "(" * n,
    ):
        assert in_page(browser, "return shown([given]).childNodes.length", text) == 1


def test_what_is_selected_stays_selected_and_who_reads_above_is_left_there(scripted, browser):
    more, last = threading.Event(), threading.Event()
    scripted.will_say("First words", more, " go on.\n\n" + "line\n\n" * 60 + "still", last, " here")
    ask(browser, "hi", "document.querySelector('.answer .text')?.textContent === 'First words'")
    browser.js(
        "const { firstChild } = document.querySelector('.answer p');"
        "getSelection().setBaseAndExtent(firstChild, 0, firstChild, 5)"
    )
    more.set()
    browser.until("document.querySelector('.answer .text').textContent.endsWith('still')")
    assert browser.js("return String(getSelection())") == "First"
    log = "const log = document.getElementById('log');"
    assert browser.js(f"{log} return log.scrollHeight - log.clientHeight - log.scrollTop") < 3
    browser.js(f"{log} log.scrollTop = 10")
    browser.until("!document.getElementById('latest').hidden")
    last.set()
    browser.until(DONE)
    assert browser.js(f"{log} return log.scrollTop") == 10
    browser.click("#latest")
    browser.until("document.getElementById('latest').hidden")


# ----------------------------------------------------------------------------------------------------- keys and history


def test_all_is_done_by_keyboard(scripted, browser):
    assert browser.js("return document.activeElement.id") == "message"
    browser.type("one")
    browser.press("Shift", "Enter")
    scripted.will_say("first")
    ask(browser, "two")
    assert scripted.asked[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert browser.js("return document.activeElement.id") == "message"

    browser.press("Up")  # edit the last message
    assert browser.js("return document.getElementById('message').value") == "one\ntwo"
    scripted.will_say("second")
    ask(browser, "!", f"{DONE} && document.querySelector('.answer .text').textContent === 'second'")
    assert scripted.asked[1]["messages"] == [{"role": "user", "content": "one\ntwo!"}]
    browser.press("Up")
    browser.type("no")
    browser.press("Escape")
    assert browser.js("return document.getElementById('message').value") == ""

    scripted.will_say("third")
    browser.press("Alt", "r")  # answer again
    browser.until(f"{DONE} && document.querySelector('.answer .text').textContent === 'third'")
    assert scripted.asked[2]["messages"] == scripted.asked[1]["messages"]
    browser.press("Alt", "k")
    assert browser.js("return document.getElementById('keys').open")
    browser.press("Escape")
    browser.press("Alt", "n")
    browser.until("!document.querySelector('article')")
    browser.until(status_says("New conversation"))

    seen = []
    for _ in range(16):  # once around
        browser.press("Tab")
        seen.append(browser.js("const e = document.activeElement; return e.id || e.className"))
    assert {"send", "new", "chat", "small", "model", "theme", "settings-button", "log", "message"} <= set(seen)


def test_settings_are_checked_and_sent(scripted, browser):
    browser.press("Alt", "o")
    assert browser.js("return document.activeElement.id") == "system"
    browser.type("Be brief.")
    for field, bad in (
        ("temperature", "warm"),
        ("top_p", "1.5"),
        ("top_k", "0"),
        ("max_tokens", "1e3"),
        ("seed", "-1"),
    ):
        browser.js("document.getElementById(arguments[0]).focus()", f"set-{field}")
        browser.type(bad)
        browser.press("Enter")
        assert browser.js("return document.getElementById('settings').open")
        assert browser.js("return document.activeElement.id") == f"set-{field}"
        assert bad in browser.js("return document.getElementById(arguments[0]).textContent", f"set-{field}-wrong")
        assert browser.js("return document.activeElement.getAttribute('aria-invalid')") == "true"
        browser.js("document.activeElement.value = ''")
    for field, good in (("temperature", "0.7"), ("top_p", ".9"), ("top_k", "40"), ("max_tokens", "64"), ("seed", "11")):
        browser.js("document.getElementById(arguments[0]).focus()", f"set-{field}")
        browser.type(good)
    browser.press("Enter")
    assert not browser.js("return document.getElementById('settings').open")
    browser.js("const m = document.getElementById('model'); m.value = 'french'; m.onchange()")
    for n in range(2):  # and again after a reload
        scripted.will_say("ok")
        ask(browser, "hi", f"{DONE} && document.querySelectorAll('.answer').length > {n}")
        browser.open(scripted.url)
        browser.until("document.getElementById('model').options.length")
    request = scripted.asked[1]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: request[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed", "model")} == {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_tokens": 64, "seed": 11, "model": "french"}  # fmt: skip


def test_conversations_are_kept_named_and_deleted(scripted, browser):
    for text in ("first question", "second question"):
        scripted.will_say(f"answer to the {text}", "\n\n```py\nx = 1\n```")
        ask(browser, text)
        browser.press("Alt", "n")
        browser.until("!document.querySelector('article')")
    browser.type("half written")
    browser.open(scripted.url)
    browser.until("document.getElementById('model').options.length")
    assert browser.js("return document.getElementById('message').value") == "half written"
    names = "[...document.querySelectorAll('#list .chat')].map((each) => each.textContent)"
    assert browser.js(f"return {names}") == ["second question", "first question"]
    browser.click("#list li:last-child .chat")
    assert said(browser).startswith("answer to the first question")
    assert browser.js("return document.querySelector('#list [aria-current]').textContent") == "first question"

    browser.js("document.querySelector('#list li:last-child .small').click()")
    browser.type("A better name")
    browser.press("Enter")
    assert browser.js(f"return {names}") == ["second question", "A better name"]
    browser.until("document.title.startsWith('A better name')")
    scripted.will_say("more")
    ask(browser, "and then?", f"{DONE} && document.querySelectorAll('.answer').length === 2")
    roles = [message["role"] for message in scripted.asked[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    browser.open(scripted.url)
    browser.until("document.querySelectorAll('.answer').length === 2")

    browser.js("document.querySelector('#list .chat:not([aria-current])').parentElement.lastChild.click()")
    browser.press("Enter")  # the focus is on keeping it
    assert len(browser.js(f"return {names}")) == 2
    browser.js("document.querySelector('#list .chat:not([aria-current])').parentElement.lastChild.click()")
    browser.click("#remove [type=submit]")
    assert browser.js(f"return {names}") == ["A better name"]
    assert "second" not in browser.js("return JSON.stringify(localStorage)")


def test_another_tab_is_heard(scripted, browser):
    scripted.will_say("one")
    ask(browser, "hi")
    browser.js(f"""
        const chat = {CHAT}, key = "litgpt.chat." + chat.id;
        chat.messages.push({{role: "user", content: "from the other tab"}}, {{role: "assistant", content: "two"}});
        chat.changed += 1;
        localStorage.setItem(key, JSON.stringify(chat));
        dispatchEvent(new StorageEvent("storage", {{key}}));
    """)
    browser.until("document.querySelectorAll('.answer').length === 2")


def test_messages_and_code_are_copied(scripted, browser):
    browser.cdp(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"], origin=scripted.url
    )
    scripted.will_say("a **b**\n\n```py\n\tx = '<i>'\n```\n")
    ask(browser, "hi")
    for css, text in (
        (".answer [data-do=copy]", "a **b**\n\n```py\n\tx = '<i>'\n```\n"),
        (".copy-code", "\tx = '<i>'"),
        (".user [data-do=copy]", "hi"),
    ):
        browser.click(css)
        browser.until(status_says("Copied"))
        assert browser.js("return navigator.clipboard.readText()") == text
        browser.js("document.getElementById('status').textContent = ''")


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("status", "more", "line"),
    [
        (400, {"message": "the context is 512", "code": "context_length_exceeded"},
         "The conversation is too long: the context is 512. Edit the last message, or begin a new conversation."),
        (422, {"message": "top_k: too large"}, "The server refuses: top_k: too large."),
        (429, {"Retry-After": "2"}, "The server is busy: too many requests wait already. Try again in 2 seconds."),
        (503, {"message": "it loads"}, "The server is not ready: it loads. Try again in a moment."),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_and_can_be_tried_again(scripted, browser, status, more, line):
    scripted.will_refuse(status, **more)
    assert ask(browser, "my words", TROUBLE) == line
    assert browser.js("return document.getElementById('trouble').getAttribute('role')") == "alert"
    assert "my words" in browser.js("return document.querySelector('.user .text').textContent")
    scripted.will_say("at last")
    browser.click("#retry")
    browser.until(DONE)
    assert said(browser) == "at last"
    assert browser.js("return document.getElementById('trouble').hidden")
    assert scripted.asked[0] == scripted.asked[1]


@pytest.mark.parametrize(
    ("end", "line"),
    [
        ([RuntimeError("gone")], "The connection was lost before the answer was whole."),
        ([], "The connection was lost before the answer was whole."),
        ([{"error": {"message": "the worker died"}}, "[DONE]"], "the worker died."),
    ],
    ids=["broken", "short", "event"],
)
def test_a_stream_that_breaks_keeps_what_came(scripted, browser, end, line):
    come = threading.Event()
    scripted.answers.append(["Once upon", come, *end])
    ask(browser, "tell", "document.querySelector('.answer .text')?.textContent === 'Once upon'")
    come.set()
    assert browser.until(TROUBLE) == line
    assert said(browser) == "Once upon"
    assert "not whole" in browser.js("return document.querySelector('.answer .note').textContent")
    scripted.will_refuse(429)
    browser.click("#retry")  # no better luck: what there was is still there
    browser.until("document.querySelector('#trouble span').textContent.includes('busy')")
    assert said(browser) == "Once upon"
    scripted.will_say("a time")
    browser.click("#retry")
    browser.until(f"{DONE} && document.querySelector('.answer .text').textContent === 'a time'")


def test_a_reload_in_the_middle_keeps_what_came(scripted, browser):
    come = threading.Event()
    scripted.will_say("Once upon", come)
    ask(browser, "tell", "document.querySelector('.answer .text')?.textContent === 'Once upon'")
    browser.open(scripted.url)
    come.set()
    browser.until(DONE)
    assert said(browser) == "Once upon"
    assert "not whole" in browser.js("return document.querySelector('.answer .note').textContent")
    come.clear()
    scripted.will_say(come, "never read")
    browser.press("Alt", "r")
    browser.until("document.querySelector('.running')")
    browser.open(scripted.url)  # before a first word: the answer before stays
    come.set()
    browser.until(DONE)
    assert said(browser) == "Once upon"


def test_a_server_that_is_gone_loses_nothing(scripted, browser):
    browser.cdp("Network.enable")
    browser.cdp("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    assert ask(browser, "my words", TROUBLE) == "The server cannot be reached. Is it still running?"
    browser.type("and more")
    browser.cdp(
        "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )
    browser.open(scripted.url)
    assert browser.until(TROUBLE) == "This message has no answer yet."
    assert browser.js("return document.getElementById('message').value") == "and more"
    scripted.will_say("here")
    browser.click("#retry")
    browser.until(DONE)
    assert scripted.asked[0]["messages"] == [{"role": "user", "content": "my words"}]


def test_a_full_storage_is_told_and_the_page_goes_on(scripted, browser):
    browser.js("for (let n = 1 << 22; n; n >>= 1) try { localStorage.setItem('fill' + n, 'x'.repeat(n)) } catch {}")
    scripted.will_say("still here")
    ask(browser, "hi " * 20)
    assert said(browser) == "still here"
    browser.until("document.querySelectorAll('#list li').length === 1")


def test_two_conversations_are_answered_at_once(scripted, browser):
    come = threading.Event()
    scripted.will_say("slow", come, " one")
    ask(browser, "first", "document.querySelector('.answer .text')?.textContent === 'slow'")
    ask(browser, "too early", "document.getElementById('message').value === 'too early'")
    browser.press("Alt", "n")
    scripted.will_say("quick one")
    ask(browser, "second")
    come.set()
    browser.until(status_says("another conversation"))
    browser.click("#list .chat[title=first]")
    assert said(browser) == "slow one"
    assert browser.js("return document.getElementById('message').value") == "too early"


# -------------------------------------------------------------------------------------------------------- for everybody


def test_light_and_dark_follow_the_system_until_told_otherwise(scripted, browser):
    scripted.will_say("See [this](https://a.b), `code`\n\n> quoted\n\n```py\nx\n```")
    ask(browser, "hi")
    scripted.will_refuse(429)
    ask(browser, "hi", TROUBLE)
    seen = []
    for scheme in ("light", "dark"):
        browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        seen.append(browser.js("return getComputedStyle(document.body).backgroundColor"))
        assert browser.js(FAINT) == [], scheme
    assert len(set(seen)) == 2
    browser.click("#theme")
    assert browser.js("return getComputedStyle(document.body).backgroundColor") == seen[0]
    browser.open(scripted.url)
    browser.until("document.documentElement.dataset.theme === 'light'")
    assert browser.js("return document.getElementById('theme').getAttribute('aria-pressed')") == "false"
    browser.cdp("Emulation.setEmulatedMedia", features=[])


FAINT = """
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const linear = (part) => (part <= 10.31 ? part / 3294.6 : ((part / 255 + 0.055) / 1.055) ** 2.4);
    const light = (colour) => {
      const [red, green, blue] = numbers(colour).map(linear);
      return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const behind = (node) => {
      const colour = getComputedStyle(node).backgroundColor;
      return (numbers(colour)[3] ?? 1) > 0 || !node.parentElement ? colour : behind(node.parentElement);
    };
    return [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility({visibilityProperty: true}) &&
        [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())).filter((node) => {
      const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05) < 4.5;
    }).map((node) => node.outerHTML);
"""


def test_a_narrow_screen_needs_no_sideways_scrolling(scripted, browser):
    wide = "word" * 60
    scripted.will_say(
        f"{wide}\n\n```\n{wide}\n```\n\n| {wide} | b |\n|-|-|\n| " + "c | " * 2 + f"\n\n- `{wide}`\n\n# {wide}"
    )
    browser.cdp("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True)
    try:
        ask(browser, wide)
        assert browser.js("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        assert browser.js("const log = document.getElementById('log'); return log.scrollWidth - log.clientWidth") == 0
        assert browser.js("return getComputedStyle(document.getElementById('chats')).visibility") == "hidden"
        browser.click("#menu")
        browser.until("getComputedStyle(document.getElementById('chats')).visibility === 'visible'")
        assert browser.js("return [document.activeElement.id, document.getElementById('room').inert]") == ["new", True]
        browser.press("Escape")
        assert browser.js("return [document.activeElement.id, document.getElementById('room').inert]") == [
            "menu",
            False,
        ]
        for name in ("settings", "keys"):
            browser.click(f"#{name}-button")
            assert browser.js("return document.documentElement.scrollWidth") == 360
            browser.press("Escape")
        browser.click("#menu")
    finally:
        browser.cdp("Emulation.clearDeviceMetricsOverride")
    browser.until("!document.getElementById('room').inert")  # wide again, nothing covers it


def test_who_listens_is_told(scripted, browser):
    come = threading.Event()
    scripted.will_say("Some words", come, " **more**")
    ask(browser, "hi", "document.querySelector('.answer .text')?.textContent === 'Some words'")
    browser.until(status_says("The model writes"))
    assert browser.js("return document.querySelector('.answer').getAttribute('aria-busy')") == "true"
    live = "[...document.querySelectorAll('[aria-live], [role=log], [role=status], [role=alert]')]"
    assert browser.js(f"return {live}.some((each) => each.contains(document.querySelector('article')))") is False
    come.set()
    browser.until(status_says("Answer: Some words more"))
    assert browser.js("return document.querySelector('.answer').getAttribute('aria-busy')") == "false"
    for landmark in ("nav", "header", "main", "form", "h1"):
        assert browser.js("return document.querySelectorAll(`${arguments[0]}:not(dialog *)`).length", landmark) == 1
    names = {
        "#new": "New conversation", "#model": "Model", "#message": "Message", "#send": "Send", "#log": "Conversation",
        "#chats": "Conversations", "#theme": "Dark colours", "#settings-button": "Settings",
        ".answer [data-do=copy]": "Copy the answer", ".answer h2": "tiny", "#list .small": "Rename hi",
    }  # fmt: skip
    assert {css: browser.name(css) for css in names} == names
    browser.press("Alt", "o")
    names = {"#settings": "Settings", "#set-top_p": "Top p", "#system": "System prompt"}
    assert {css: browser.name(css) for css in names} == names
    unnamed = """
        return [...document.querySelectorAll("button, input, textarea, select, dialog")].filter((each) => !(
          each.textContent.trim() || each.ariaLabel || each.labels?.length || each.getAttribute("aria-labelledby")
        )).map((each) => each.outerHTML)
    """
    assert browser.js(unnamed) == []

"""The page in a real browser, against a real server; skipped where there is none."""

import json
import re
import shutil

import pytest
from small_server import running

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install -c constraints.txt -e '.[browser]')"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
TEXT = "the cat sat on the mat, and the dog sat on the log. "
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def served(loaded):
    with running(*loaded) as server:
        yield server


@pytest.fixture
def page(browser, served):
    page = browser.new_page()
    page.set_default_timeout(20_000)
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(served.url) else wrong.append(request.url))
    page.goto(served.url)
    page.get_by_text("Settings").click()
    yield page
    page.close()
    assert wrong == []


def say(page, text):
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()
    page.get_by_text("tokens, generated").wait_for()


def begin_long_answer(page):
    page.get_by_label("Temperature").fill("0")  # so that the model does not end it before
    page.get_by_label("Max tokens").fill("4096")
    page.get_by_label("Message").fill("hello")
    page.get_by_label("Message").press("Enter")
    page.locator(".assistant > .said", has_text=re.compile(".{10}", re.DOTALL)).wait_for()


def answer_with(page, text):
    """Have the page show an answer that no small model would give."""
    chunks = [{"choices": [{"delta": {"content": part}}]} for part in re.findall(".{1,7}", text, re.DOTALL)]
    chunks.append({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    say(page, "hello")
    page.unroute("**/v1/chat/completions")
    return page.locator(".assistant").last


def test_a_chat_is_streamed_and_continues(page):
    page.get_by_label("Max tokens").fill("20")
    say(page, "<b>hello</b>")
    turns = page.get_by_role("article")
    assert turns.nth(0).text_content() == "<b>hello</b>"
    assert turns.nth(1).locator("> .said").text_content()
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "the cat")
    assert [message["role"] for message in sent.value.post_data_json["messages"]] == ["user", "assistant", "user"]
    page.get_by_role("button", name="New chat").click()
    assert turns.count() == 0


def test_the_settings_are_sent(page):
    page.get_by_label("System prompt").fill("a dog")
    for name, value in (
        ("Top-p", "0.5"),
        ("Frequency penalty", "1"),
        ("Presence penalty", "-0.5"),
        ("Temperature", ""),
    ):
        page.get_by_label(name).fill(value)
    page.get_by_label("Max tokens").fill("5")
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "the cat")
    body = sent.value.post_data_json
    assert body["messages"] == [{"role": "system", "content": "a dog"}, {"role": "user", "content": "the cat"}]
    penalties = {"frequency_penalty": 1, "presence_penalty": -0.5}
    assert body.items() >= ({"top_p": 0.5, "max_tokens": 5} | penalties).items()
    assert "temperature" not in body
    page.get_by_label("Top-p").fill("2")
    page.get_by_text("Settings").click()
    page.get_by_label("Message").fill("the cat")
    page.get_by_label("Message").press("Enter")
    assert page.get_by_label("Top-p").is_visible()  # what is wrong is shown
    assert page.evaluate("document.activeElement.id") == "top_p"


def test_a_chat_outlives_a_reload(page):
    page.get_by_label("Max tokens").fill("8")
    page.get_by_label("System prompt").fill("a dog")
    say(page, "<b>hello</b>")
    turns, before = page.get_by_role("article"), page.get_by_role("article").all_text_contents()
    page.reload()
    page.get_by_text("0 of 100").wait_for()
    assert turns.all_text_contents() == before
    page.get_by_text("Settings").click()
    assert (page.get_by_label("Max tokens").input_value(), page.get_by_label("System prompt").input_value()) == (
        "8",
        "a dog",
    )
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "the cat")
    roles = [message["role"] for message in sent.value.post_data_json["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    page.get_by_role("button", name="New chat").click()
    page.reload()
    page.get_by_text("0 of 100").wait_for()
    assert turns.count() == 0


def test_an_answer_that_a_reload_cuts_off_stays(page):
    begin_long_answer(page)
    page.reload()
    page.get_by_text("0 of 100").wait_for()
    assert len(page.locator(".assistant > .said").last.text_content()) >= 10


def test_nothing_in_a_text_runs_or_loads(page):
    """Neither in a prompt nor in an answer, and a link leads to the web alone."""
    attack = "<img src=x onerror=window.pwned=1> <script>window.pwned=1</script> <svg onload=window.pwned=1>"
    links = (
        "[a](javascript:window.pwned=1) [b](JaVaScRiPt:window.pwned=1) [c](data:text/html,x) [d](https://example.org/x)"
    )
    blocks = f"{attack}\n\n# {attack}\n\n- {attack}\n\n> `{attack}`\n\n```html\n{attack}\n```"
    text = f"{blocks}\n\n{links} <https://example.org> https://example.com."
    page.get_by_label("Max tokens").fill("1")
    say(page, text)
    article = answer_with(page, text)
    for kind in ("img", "script", "svg", "iframe", "object", "style"):
        assert page.locator(f"#talk {kind}").count() == 0
    assert article.text_content().count("<img src=x onerror=window.pwned=1>") == 5
    found = article.get_by_role("link").evaluate_all("links => links.map(a => [a.href, a.rel])")
    addresses = "https://example.org/x", "https://example.org/", "https://example.com/"
    assert found == [[address, "noopener noreferrer"] for address in addresses]
    assert "[a](javascript:window.pwned=1)" in article.text_content()
    assert page.evaluate("window.pwned") is None


def test_markdown_becomes_elements(page):
    article = answer_with(
        page,
        "# Title\n\nSome **bold *and* words**, `a*b*c`, 2 * 3 * 4, snake_case_name, _so_ \\*.\nnext line\n\n"
        "3. three\n4. four\n   - nested\n\n> quoted\n\n---\n\n```python\ndef f(x):\n    return x**2**3\n```\n"
        "end\n```\nopen",
    )
    html = article.locator("> .said").inner_html()
    assert html == (
        "<h3>Title</h3><p>Some <strong>bold <em>and</em> words</strong>, <code>a*b*c</code>, "
        "2 * 3 * 4, snake_case_name, <em>so</em> *.\nnext line</p>"
        '<ol start="3"><li>three</li><li>four<ul><li>nested</li></ul></li></ol>'
        "<blockquote><p>quoted</p></blockquote><hr>"
        "<pre><code>def f(x):\n    return x**2**3</code></pre><p>end</p><pre><code>open</code></pre>"
    )


@pytest.mark.parametrize("text", ["*_" * 8000, "`" * 16000, "[" * 16000, ">" * 16000, "- " * 8000, "**a " * 4000])
def test_no_text_keeps_the_page_busy(page, text):
    lengths = page.evaluate(
        "text => [text, 'a ' + text].map((x) => make('p', ...markdown(x)).textContent.length)", text
    )
    assert lengths[1] > 0


def test_thoughts_are_folded_and_not_copied(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    article = answer_with(page, "<think>\nthe cat sat\n</think>\n\nthe **mat**")
    assert not article.get_by_text("the cat sat").is_visible()
    article.get_by_text("Thoughts").click()
    assert article.get_by_text("the cat sat").is_visible()
    page.get_by_role("button", name="Copy answer").click()
    page.get_by_role("status").get_by_text("copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "the **mat**"
    unfinished = answer_with(page, "<think>\nthe dog")
    assert not unfinished.get_by_text("the dog").is_visible()


def test_the_keyboard_alone_is_enough(page):
    begin_long_answer(page)
    assert page.locator("#talk").get_attribute("aria-busy") == "true"
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    assert page.locator("#talk").get_attribute("aria-busy") is None
    page.get_by_label("Max tokens").fill("3")
    page.get_by_label("Message").focus()
    page.keyboard.type("the cat")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("sat")
    assert page.get_by_label("Message").input_value() == "the cat\nsat"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    page.get_by_text("tokens, generated").wait_for()
    assert page.evaluate("document.activeElement.id") == "message"


def test_every_field_and_button_has_a_name(page):
    answer_with(page, "the mat")
    unnamed = page.locator("input:visible, select:visible, textarea:visible, button:visible").evaluate_all(
        "all => all.filter(x => !(x.labels?.length || x.ariaLabel || x.textContent)).map(x => x.outerHTML)"
    )
    assert unnamed == []


CONTRASTS = """() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const luminance = (color) => {
    const [r, g, b] = rgb(color).map((x) => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    const color = getComputedStyle(e).backgroundColor;
    return rgb(color)[3] === 0 ? ground(e.parentElement) : color;
  };
  const hasWords = (e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return [...document.querySelectorAll("body *")]
    .filter((e) => e.checkVisibility() && !e.disabled && hasWords(e))
    .map((e) => {
      const [light, dark] = [luminance(getComputedStyle(e).color), luminance(ground(e))].sort((x, y) => y - x);
      return [(light + 0.05) / (dark + 0.05), e.outerHTML.slice(0, 80)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_words_stand_out(page, scheme):
    """By WCAG 2.2, 4.5 to 1 or more."""
    page.emulate_media(color_scheme=scheme)
    article = answer_with(page, "<think>a</think># b\n\n> c `d` https://example.com\n\n```\ne\n```")
    article.get_by_text("Thoughts").click()
    found = page.evaluate(CONTRASTS)
    assert len(found) > 20
    assert [pair for pair in found if pair[0] < 4.5] == []


def test_stop_frees_the_lane(page, served):
    begin_long_answer(page)
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for()
    assert served.metric("rmkv_tokens_written_total") < 4096


def test_a_new_chat_knows_nothing_of_an_answer_that_it_cut_off(page):
    begin_long_answer(page)
    page.get_by_role("button", name="New chat").click()
    page.get_by_text("stopped").wait_for()
    page.get_by_label("Max tokens").fill("5")
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "the cat")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "the cat"}]


def test_a_text_is_read_into_a_memory_that_a_chat_continues(page, served, tmp_path, loaded):
    book = tmp_path / "book.txt"
    book.write_text(TEXT * 1000)
    page.get_by_label("Name").fill("book")
    page.get_by_label("or a file").set_input_files(book)
    page.get_by_role("button", name="Read").click()
    tokens = len(loaded[1].encode_document([TEXT * 1000]))
    page.locator("#memories").get_by_text(f"{tokens:,} tokens read in").wait_for(timeout=120_000)
    assert page.locator("#memory").input_value() == "book"
    page.get_by_label("Max tokens").fill("5")
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "the cat")
    assert (sent.value.post_data_json["memory"], sent.value.post_data_json["keep"]) == ("book", True)
    assert served.ask("GET", "/v1/memories/book").json()["tokens"] > tokens
    page.get_by_role("button", name="Delete book").click()
    page.get_by_text("0 of 100").wait_for()
    assert served.ask("GET", "/v1/memories").json()["data"] == []


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_narrow_and_wide_in_light_and_dark(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.get_by_label("Max tokens").fill("60")
    say(page, "hello")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) / 3 > 128
    assert light == (scheme == "light")


def test_the_key_is_asked_for(browser, loaded):
    with running(*loaded, key="secret") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Tab")
        page.get_by_text("0 of 100").wait_for()
        page.close()

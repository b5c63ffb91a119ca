"""The page in a real browser, against a real server; skipped where there is none."""

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
    yield page
    page.close()
    assert wrong == []


def say(page, text):
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()
    page.get_by_text("tokens, wrote").wait_for()


def test_a_chat_is_streamed_and_continues(page):
    page.get_by_label("Most tokens").fill("20")
    say(page, "<b>hello</b>")
    turns = page.locator(".turn")
    assert turns.nth(0).text_content() == "<b>hello</b>"
    assert turns.nth(1).text_content()
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "the cat")
    assert [message["role"] for message in sent.value.post_data_json["messages"]] == ["user", "assistant", "user"]
    page.get_by_role("button", name="New chat").click()
    assert turns.count() == 0


def test_stop_frees_the_lane(page, served):
    page.get_by_label("Temperature").fill("0")  # so that the model does not end it before
    page.get_by_label("Most tokens").fill("4096")
    page.get_by_label("Message").fill("hello")
    page.get_by_label("Message").press("Enter")
    page.locator(".assistant", has_text=re.compile(".{10}", re.DOTALL)).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for()
    assert served.metric("rmkv_tokens_written_total") < 4096


def test_a_new_chat_knows_nothing_of_an_answer_that_it_cut_off(page):
    page.get_by_label("Temperature").fill("0")  # so that the model does not end it before
    page.get_by_label("Most tokens").fill("4096")
    page.get_by_label("Message").fill("hello")
    page.get_by_label("Message").press("Enter")
    page.locator(".assistant", has_text=re.compile(".{10}", re.DOTALL)).wait_for()
    page.get_by_role("button", name="New chat").click()
    page.get_by_text("stopped").wait_for()
    page.get_by_label("Most tokens").fill("5")
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
    page.get_by_label("Most tokens").fill("5")
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
    page.get_by_label("Most tokens").fill("60")
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

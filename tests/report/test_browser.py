"""The page in a real browser; skipped where there is none."""

import shutil

import pytest

from rmkv_cli.report import write_report

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install -c constraints.txt -e '.[browser]')"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def lightness(page, what, of="document.body"):
    colour = page.evaluate(f"getComputedStyle({of}).{what}")
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3


def test_it_fits_narrow_and_wide_in_light_and_dark_and_in_print(evaluated):
    run, _ = evaluated
    written = write_report([run], run / "report")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page()
        wrong = []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: None if request.url == written.html.as_uri() else wrong.append(request.url))
        page.goto(written.html.as_uri())
        for width, scheme in ((375, "light"), (375, "dark"), (1200, "light"), (1200, "dark")):
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert (lightness(page, "backgroundColor") > 128) == (scheme == "light")
            words = "document.querySelector('svg text')"
            assert (lightness(page, "fill", words) < 128) == (scheme == "light")
            widest = page.evaluate("Math.max(...[...document.querySelectorAll('svg')].map(x => x.clientWidth))")
            assert 250 < widest <= width
        page.emulate_media(media="print", color_scheme="dark")
        assert lightness(page, "backgroundColor") == 255
        assert lightness(page, "fill", "document.querySelector('svg text')") == 0
        page.get_by_role("link", name="Memory").click()
        assert page.evaluate("document.querySelector('#memory') === document.querySelector(':target')")
        assert page.get_by_role("img").count() == 5
        page.set_viewport_size({"width": 1280, "height": 800})
        result = page.locator("#final-evaluation ~ .wide").first.bounding_box()
        page.evaluate("scrollTo(0, 0)")
        assert page.locator("h1 + p").bounding_box()["y"] < page.locator("#final-evaluation").bounding_box()["y"] < 800
        assert result["width"] > 900
        browser.close()
    assert wrong == []

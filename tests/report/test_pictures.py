"""Lines of pictures are distinguishable and readable on any background."""

import re
from pathlib import Path

import pytest

import rmkv_cli.report.pictures as pictures
from rmkv_cli.report.pictures import INKS, Line, draw_lines, positions

PAGE = (Path(pictures.__file__).parent / "page.html").read_text(encoding="utf-8")


def contrast(one, other):
    """That of two colours (WCAG 2, 1.4.3)."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_lines_and_words_stand_out_from_both_grounds():
    light, dark, _ = re.findall(r"--ground: (#\w+); --ink: (#\w+); --soft: (#\w+); --line: #\w+; --link: (#\w+)", PAGE)
    for ground, ink, soft, link in (light, dark):
        assert all(contrast(colour, ground) >= 3 for colour in INKS)
        assert all(contrast(words, behind) >= 4.5 for words in (ink, link) for behind in (ground, soft))


def test_an_svg_takes_the_page_s_colour_and_shares_no_id(tmp_path):
    points = [(31.5, 3.0), (95.5, 2.5)]
    picture = positions({"a $x$ <b>": points, "_c 猫": points})
    svg = picture.svg()
    assert "currentColor" in svg
    assert "#000000" not in svg
    assert not re.search(r"<style|<metadata|<!--|<image|https?://(?!www\.w3\.org/)", svg)
    assert all(name.startswith("loss-by-position-") for name in re.findall(r'id="([^"]+)"', svg))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
    assert used
    assert set(used) <= set(re.findall(r'id="([^"]+)"', svg))
    assert "a $x$ &lt;b&gt;" in svg
    assert "_c 猫" in svg
    assert svg == positions({"a $x$ <b>": points, "_c 猫": points}).svg()
    picture.write_png(tmp_path)
    assert (tmp_path / "loss-by-position.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_unit_has_an_axis_to_the_right():
    points = [(1, 2.0), (2, 1.0)]
    lines = [Line("loss", points, 0, "nats"), Line("bits", points, 1, "bits"), Line("other loss", points, 2, "nats")]
    picture = draw_lines("curves", "losses", "tokens", lines, bad_steps=[1])
    left, right = picture.figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("nats", "bits")
    assert (len(left.get_lines()), len(right.get_lines())) == (3, 1)  # two losses and the skipped steps
    assert right.yaxis.get_ticks_position() == "right"
    (legend,) = picture.figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == [
        "loss",
        "bits (right)",
        "other loss",
        "skipped steps",
    ]
    assert picture.words == "losses, nats and bits, by tokens. " + "; ".join(
        f"{line.label}: from 2 to 1" for line in lines
    )


@pytest.mark.parametrize("count", [1, 9])
def test_each_line_is_named_where_there_are_several(count):
    svg = positions({f"run {i}": [(1, i), (2, i + 1)] for i in range(count)}).svg()
    assert svg.count("> run ") == (0 if count == 1 else count)
    assert f"run {count - 1}: from {count - 1} to {count}" in svg


def test_many_long_names_leave_the_lines_their_room():
    few, many = (positions({f"{i} {'name' * 15}": [(1, i), (2, i + 1)] for i in range(n)}) for n in (2, 20))
    for picture in (few, many):
        picture.svg()  # lays it out
    heights = [picture.figure.axes[0].get_position().height * picture.figure.get_figheight() for picture in (few, many)]
    assert heights[1] > 0.9 * heights[0]

"""A figure as a picture within a page."""

import io
import re
from xml.etree import ElementTree

import numpy as np
from sd_gym.agents.drawing.style import as_svg, figure, style


def test_a_picture_of_a_page_shows_all_that_the_figure_does():
    with style():
        made = figure(2)
        axes = made.subplots()
        axes.plot([0, 1 / 3, 1], [0.1234567, 1 / 3, 1], "o-", label="0.1234567 & <b>")
        axes.legend()
        plain = io.StringIO()
        made.savefig(plain, format="svg", transparent=True)
        light = as_svg(made, "some", 'said "so"')
    pictures = [ElementTree.fromstring(one) for one in (plain.getvalue(), light)]
    name = "{http://www.w3.org/2000/svg}"
    for kind in ("path", "use", "text", "clipPath"):
        counts = [len(list(one.iter(name + kind))) for one in pictures]
        assert counts[0] == counts[1] > 0
    shown = [[one.text for one in picture.iter(name + "text")] for picture in pictures]
    assert shown[0] == shown[1]
    assert "0.1234567 & <b>" in shown[1]
    first, second = ([one.attrib["d"].split() for one in picture.iter(name + "path")] for picture in pictures)
    for full, short in zip(first, second, strict=True):
        assert [word for word in full if word.isalpha()] == [word for word in short if word.isalpha()]
        numbers = [[float(word) for word in words if not word.isalpha()] for words in (full, short)]
        np.testing.assert_allclose(*numbers, atol=0.006)
    assert pictures[1].attrib["aria-label"] == 'said "so"'
    assert not re.search(r"font-family|<style", light)  # what the page says once, or nobody sees

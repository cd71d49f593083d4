"""A figure as a picture within a page."""

import io
import re
from xml.etree import ElementTree

import numpy as np
from sd_gym.agents.drawing.run_picture import plot_run
from sd_gym.agents.drawing.style import agent_styles, as_svg, figure, style
from sd_gym.agents.report.charts import draw_curves, draw_results


def test_more_flops_than_dense_are_within_every_picture():
    """Going on after the answer can cost more."""
    histories = [
        [{"step": step, "quality": 0.9, "quality_ref": 0.9, "flops_ratio_with_policy": 1.27} for step in (0, 100)]
    ]
    with style():
        quality, flops = figure(2).subplots(2, 1)
        draw_curves(quality, flops, {"ppo": histories}, agent_styles(["ppo"]), 0.01)
        assert flops.get_ylim()[1] > 127
        (legend,) = flops.figure.legends
        assert [one.get_text() for one in legend.get_texts()] == ["allowed loss", "ppo"]
        axes = figure(2).subplots()
        points = [np.array([0.0]), np.array([50.0]), np.array([0.0]), np.array([127.0])]
        draw_results(axes, {"ppo": points}, agent_styles(["ppo"]), 0.01)
        assert axes.get_xlim()[1] > 127


def test_a_run_without_validations_shows_its_test_at_one_tick(monkeypatch, tmp_path):
    pictures, rates = [], {"difficulty": 1, "instances": 4, "flops_ratio_with_policy": 1.0, "skip_rate": [0.0]}
    monkeypatch.setattr("sd_gym.agents.drawing.run_picture.write_png", lambda picture, file: pictures.append(picture))
    result = {"history": [], "epsilon": 0.01, "quality_difference": 0.0, "flops_ratio_with_policy": 1.0}
    plot_run({**result, "by_difficulty": [rates]}, ["encoder.0.attention"], tmp_path / "result.png")
    quality, flops, *_ = pictures[0].get_axes()
    assert quality.get_legend_handles_labels()[1] == ["dense", "allowed loss", "test, selected policy"]
    assert flops.get_xticks().tolist() == [0]


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

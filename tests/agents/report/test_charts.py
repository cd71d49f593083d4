"""Pictures of reports."""

import numpy as np
from sd_gym.agents.drawing.style import AgentStyle, figure, style
from sd_gym.agents.report.charts import draw_results


def test_a_legend_is_no_wider_than_its_picture():
    names = ["ppo (network wide-and-deep, reward.objective lexicographic, steps 1000, another setting 12)", "a2c"]
    styles = {name: AgentStyle(color, "o", "-") for name, color in zip(names, ("red", "blue"), strict=True)}
    with style():
        picture = figure(4.0)
        draw_results(picture.subplots(), {name: [np.array([50.0])] * 4 for name in names}, styles, 0.01)
        picture.draw_without_rendering()
    [legend] = picture.legends
    drawn = legend.get_window_extent()
    assert picture.bbox.x0 <= drawn.x0
    assert drawn.x1 <= picture.bbox.x1
    assert len(legend.get_texts()) == 4

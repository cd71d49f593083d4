"""Style of pictures: colours for the colour-blind, and a marker and a line style per agent.

A figure becomes a PNG, or an SVG inside a page, with the colours of the page, light or dark.
"""

import io
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from sd_gym.files import write_file

INK, PAPER = "#1f2328", "#fdfdfc"
RAN, LOST = "#0072b2", "#d55e00"
# Okabe and Ito (2008) without yellow, which is too light for lines.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS, CONTROL_MARKERS = ("o", "s", "^", "D", "v", "P", "X"), ("x", "+", "1", "2", "3", "4", "|", "_")
LINES = ("-", "--", "-.", ":")
SKIP_RATE = LinearSegmentedColormap.from_list("skip rate", [to_rgba(RAN, alpha) for alpha in (1, 0)])  # solid: ran
# Style of the line of the allowed loss. No agent has its dash, dot, dot.
ALLOWED: dict[str, Any] = {"color": INK, "linewidth": 1, "linestyle": (0, (6, 2, 1, 2, 1, 2)), "label": "allowed loss"}
WIDTH = 4.3  # inches, so that letters are readable on a phone
SETTINGS: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8.5, "svg.fonttype": "none"},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.15},
    **{"axes.facecolor": "none", "figure.facecolor": PAPER, "text.parse_math": False},  # names may have a $
}


class AgentStyle(NamedTuple):
    """Colour and marker of an agent's points, and the style of its line."""

    color: str
    marker: str
    linestyle: str


def agent_styles(agents: Iterable[str], controls: Iterable[str] = ()) -> dict[str, AgentStyle]:
    """A style for each agent; controls have the ink colour and other markers, the oracle a star."""
    styles = {
        name: AgentStyle(COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)], LINES[n % len(LINES)])
        for n, name in enumerate(dict.fromkeys(agents))
    }
    for n, name in enumerate(dict.fromkeys(controls)):
        marker = "*" if name.startswith("oracle") else CONTROL_MARKERS[n % len(CONTROL_MARKERS)]
        styles[name] = AgentStyle(INK, marker, LINES[-1 - n % len(LINES)])
    return styles


def figure(height: float, *, width: float = WIDTH) -> Figure:
    """An empty figure of a size in inches; made and drawn on within ``style()``."""
    return Figure(figsize=(width, height), layout="constrained")


def flops_limit(highest: float) -> float:
    """The end of an axis of FLOPs in % of dense: going on after the answer can cost more than dense."""
    return max(104.0, 1.04 * highest)


def style() -> AbstractContextManager[None]:
    """A context in which figures are made and drawn on."""
    return matplotlib.rc_context(SETTINGS)


def write_png(picture: Figure, file: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_file(file, lambda temporary: picture.savefig(temporary, format="png", dpi=120))


def as_svg(picture: Figure, name: str, words: str) -> str:
    """A figure as an SVG element for a page, in the page's colours ``--paper`` and ``--blue``.

    The page has one style sheet for the fonts and line ends of all pictures, as one within a picture would apply to the
    whole page. ``name`` is unique on the page; ``words`` describe the picture for screen readers.
    """
    buffer = io.StringIO()
    paper = picture.get_facecolor()
    picture.set_facecolor("none")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(picture).print_svg(buffer, metadata={"Date": None, "Creator": None})  # savefig draws twice
    picture.set_facecolor(paper)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, of_page in ((INK, "currentColor"), (PAPER, "var(--paper)"), (RAN, "var(--blue)")):
        text = text.replace(colour, of_page)
    text = _minified(re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL))
    # Ids get the name, or one picture is drawn with parts of another.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1)


def _minified(svg: str) -> str:
    """A Matplotlib SVG without unused ids, fonts, digits and spaces, which are most of its characters."""
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r'transform="rotate\(-?0 [^)]*\)"', "", svg)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg))

    def minified_tag(tag: re.Match[str]) -> str:
        text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", tag[0])
        text = re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), text)
        return re.sub(r"\s+", " ", text)

    return re.sub(r">\s+<", "><", re.sub(r"<[^>]*>", minified_tag, svg))

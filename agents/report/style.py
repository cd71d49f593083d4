"""How pictures look: colours that the colour-blind tell apart, a marker and a line of its own for each agent.

The same figure becomes a PNG on paper, or an SVG inside a page whose ink and paper are the page's own, light or dark.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

INK, PAPER = "#1f2328", "#fdfdfc"
RAN, LOST = "#0072b2", "#d55e00"
# Okabe and Ito (2008), but their yellow, which is no line on paper.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
# What ran is solid, what was skipped is paper: so the bright colour is never what was left out.
SKIP_RATE = LinearSegmentedColormap.from_list("skip rate", [to_rgba(RAN, alpha) for alpha in (1, 0)])
WIDTH = 4.3  # inches: as wide as a telephone, so that letters stay readable there
SETTINGS = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
}


class Look(NamedTuple):
    """How an agent is drawn.

    Attributes:
        color: A colour.
        marker: A marker.
        linestyle: Of its line.
    """

    color: str
    marker: str
    linestyle: str


def looks(agents: Iterable[str], controls: Iterable[str] = ()) -> dict[str, Look]:
    """A look for each agent; controls are ink, with markers of their own, and the oracle is a star."""
    found = {
        name: Look(COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)], LINES[n % len(LINES)])
        for n, name in enumerate(dict.fromkeys(agents))
    }
    marks = ("x", "+", "1", "2", "3", "4", "|", "_")
    for n, name in enumerate(dict.fromkeys(controls)):
        mark = "*" if name.startswith("oracle") else marks[n % len(marks)]
        found[name] = Look(INK, mark, LINES[-1 - n % len(LINES)])
    return found


def figure(height: float, *, width: float = WIDTH) -> Figure:
    """An empty figure of a size in inches; to be made, and drawn on, within ``style()``."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def style() -> Any:
    """A context in which figures are made and drawn on."""
    return matplotlib.rc_context(SETTINGS)


def write_png(made: Figure, file: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    temporary = file.with_suffix(".tmp.png")
    made.savefig(temporary, dpi=120)
    os.replace(temporary, file)


def as_svg(made: Figure, name: str, words: str) -> str:
    """A figure as an SVG element for a page: its ink is the page's, its paper ``--paper``, and its blue ``--blue``.

    The style sheet of the page has the fonts and how lines end, once for all pictures: one within a picture counts for
    all of the page, and a browser goes through the page again for each.

    Args:
        made: The figure.
        name: A name that no other figure of the page has, for its ids.
        words: What is seen, for who does not see it; plain text.
    """
    buffer = io.StringIO()
    paper = made.get_facecolor()
    made.set_facecolor("none")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        # Not savefig, which draws twice.
        FigureCanvasSVG(made).print_svg(buffer, metadata={"Date": None, "Creator": None})
    made.set_facecolor(paper)
    text = buffer.getvalue()
    text = (
        text[text.index("<svg") :]
        .replace(INK, "currentColor")
        .replace(PAPER, "var(--paper)")
        .replace(RAN, "var(--blue)")
    )
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = _light(text)
    # Ids get a name, or one picture is drawn with parts of another.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    label = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _light(svg: str) -> str:
    """An SVG of Matplotlib's without what is not seen of it: most of its elements, and most of its characters."""
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r'transform="rotate\(-?0 [^)]*\)"', "", svg)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg))
    parts, groups = [], []
    for part in re.split(r"(<[^>]*>)", svg):
        if not part.startswith("<"):
            parts.append(part if part.strip() else "")
            continue
        tag = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", part)
        tag = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), tag)
        tag = re.sub(r"\s+", " ", tag)
        if tag == "</g>":
            tag = groups.pop()
        elif tag.startswith("<g ") or tag == "<g>":
            groups.append("" if tag == "<g>" else "</g>")
            tag = "" if tag == "<g>" else tag
        parts.append("" if tag == "<g/>" else tag)
    return "".join(parts)

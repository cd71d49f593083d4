"""The report: one page that needs nothing else."""

import csv
import re
from html.parser import HTMLParser
from urllib.parse import unquote

from sd_gym.agents.report.page import write_report
from typer.testing import CliRunner

from sd_gym.cli import app
from tests.agents.report.conftest import seeds


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.open, self.pictures = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        found = dict(attributes)
        self.addresses += [found[name] for name in ("href", "src", "xlink:href") if name in found]
        if tag == "svg":
            self.pictures.append(found["aria-label"])


def test_the_page_needs_nothing_else_and_begins_with_the_verdict(run, tmp_path):
    folders = [*seeds(run, "ppo", [0.3, 0.32, 0.31]), *seeds(run, "mine", [0.5, 0.52, 0.51]), run("hull", flops=0.6)]
    page = tmp_path / "deep" / "report.html"
    shown = CliRunner().invoke(app, ["report", *map(str, folders), "-o", str(page)])
    assert shown.exit_code == 0, shown.output
    text = page.read_text()
    parsed = Page(text)
    assert not {"script", "link", "img", "iframe"} & parsed.tags
    assert all(address.startswith(("#", "data:")) for address in parsed.addresses)  # inside the page
    assert set(re.findall(r"https?://[^\"' )]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert text.index("ppo keeps the quality in all 3 runs") < text.index("<table") < text.index("<svg")
    assert len(parsed.pictures) == 7  # profiles, plane, curves, instances, and what each of three agents skips
    assert "sd-gym train SD/Classification-Mini-v0 --algo mine" in text
    for shown in ("2.13.0", "abc123", "rows2000"):
        assert shown in text


def test_ids_in_a_page_are_unique(run, tmp_path):
    """Or the clip paths of one picture cut another."""
    (page,) = write_report([*seeds(run, "ppo", [0.3, 0.4]), *seeds(run, "a2c", [0.3, 0.5])], tmp_path / "report.html")
    text = page.read_text()
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    used = {*re.findall(r'xlink:href="#([^"]*)"', text), *re.findall(r"url\(#([^)]*)\)", text)}
    assert used <= set(ids)
    assert text.count("<style") == 1  # one within a picture would count for all of the page


def test_names_are_text(run, tmp_path):
    page, *_ = write_report([run("<b>bold</b> at $\\none_{}$", seed=None)], tmp_path / "report.html", also=True)
    assert "b" not in Page(page.read_text()).tags
    assert "&lt;b&gt;bold&lt;/b&gt; at $\\none_{}$, seed -:" in page.read_text()


def test_the_same_is_there_as_markdown_csv_and_png(run, tmp_path):
    folders = seeds(run, "ppo", [0.3, 0.4])
    written = write_report(folders, tmp_path / "my report.html", also=True)
    assert {file.suffix for file in written} == {".html", ".md", ".csv", ".png"}
    with (tmp_path / "my report.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["flops_ratio_with_policy"]) for row in rows] == [0.3, 0.4]
    assert [row["seed"] for row in rows] == ["0", "1"]
    text = (tmp_path / "my report.md").read_text()
    pictures = re.findall(r"\]\(([^)\s]*\.png)\)", text)  # a space would end the address
    assert pictures
    assert all((tmp_path / unquote(picture)).exists() for picture in pictures)
    assert "ppo keeps the quality in all 2 runs and runs 35.0% of the FLOPs" in text


def test_folders_that_hold_no_run_are_said(tmp_path):
    shown = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert shown.exit_code == 2
    assert "expected finished runs" in shown.stderr

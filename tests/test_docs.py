"""The pages that are written by hand stay short, and the site can be read without network."""

import json
import re
from pathlib import Path

import yaml
from sd_gym.agents.registry import AGENTS, agent_class

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def words(*files):
    return sum(len(file.read_text(encoding="utf-8").split()) for file in files)


def test_the_pages_are_short():
    assert words(ROOT / "README.md") <= 800
    assert words(ROOT / "CHANGELOG.md") <= 400
    assert words(*(ROOT / "docs").glob("results*.md")) <= 1500
    assert words(*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md") <= 11_000
    assert {page.name: words(page) for page in PAGES if words(page) > 900} == {}


def test_every_page_is_in_the_nav():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    assert [page.name for page in PAGES if f"{page.name}" not in nav] == []


def test_pictures_are_light_and_dark():
    pages = "".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *PAGES])
    shown = set(re.findall(r"(?:docs/)?(\w+_(?:light|dark)\.svg)#gh-(?:light|dark)-mode-only", pages))
    assert {f"latency_{theme}.svg" for theme in ("light", "dark")} <= shown
    assert shown == {file.name for file in (ROOT / "docs").glob("*.svg")}


def test_every_learner_has_a_curve():
    curves = json.loads((ROOT / "docs" / "curves.json").read_text(encoding="utf-8"))
    assert set(curves) == {name for name in AGENTS.names() if not agent_class(name).is_control}


def test_the_site_asks_nothing_of_the_network():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["theme"]["font"] is False
    assert "offline" in site["plugins"]
    assert all((ROOT / "docs" / script).is_file() for script in site["extra"]["polyfills"])


def test_the_page_about_libraries_trains_with_stable_baselines3():
    page = (ROOT / "docs" / "libraries.md").read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0]
    names = {}
    exec(compile(block.replace("2_000", "256"), "docs/libraries.md", "exec"), names)
    assert names["model"].num_timesteps == 256

"""A hook of MkDocs: makes the pages that come from code (envs, algorithms, reference, examples) and mends links.

README.md, CONTRIBUTING.md, CHANGELOG.md and SECURITY.md become pages as they are. Links that work on a code host, such
as ``../examples/own_ppo.py``, become links to pages of the site.
"""

import importlib
import inspect
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import griffe
import gymnasium as gym
import numpy as np
from draw import THEMES, curves_picture
from mkdocs.structure.files import File, Files
from sd_gym.agents.registry import AGENTS, agent_class
from typer.cli import get_docs_for_click
from typer.main import get_command

from sd_gym.cli import app
from sd_gym.envs.listing import Page, page_of
from sd_gym.envs.render import LETTERS
from sd_gym.envs.table_files import table_folder
from sd_gym.registration import CONFIG_FOLDER, SERVING, all_ids, config_of, shipped_tables

ROOT = Path(__file__).parent.parent
SHEETS = {"README": "index", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog", "SECURITY": "security"}
SECTIONS = "Description, Action Space, Observation Space, Reward, Episode End, Info, Arguments, Version History"
FEW = {"train_size": 4, "validation_size": 4, "test_size": 4}
BART = {"facebook/bart-base": 30, "facebook/bart-large-cnn": 60, "facebook/bart-large-xsum": 60}  # 2 + 3 per layer
YOURS = "--set dataset=reviews.jsonl --set backbone=my-bert"
WHERE = {  # an env that an algorithm can run on, where the TREC table is not one
    "cascade": "SD/Classification-TREC-Staged-Table-v0",
    "confidence": f"SD/Classification-Custom-Staged-v0 {YOURS}",
    "early-exit": f"SD/Classification-Custom-v0 {YOURS}",
}
MODULES = [
    "sd_gym",
    "sd_gym.envs",
    "sd_gym.envs.wrappers",
    "sd_gym.envs.sb3",
    "sd_gym.envs.serving.shells",
    "sd_gym.envs.serving.dial",
    "sd_gym.agents",
    "sd_gym.policy",
]
MODULES += ["sd_gym.switch", "sd_gym.inference.texts", "sd_gym.inference.onnx", "sd_gym.objectives"]
MODULES += ["sd_gym.serving.server", "sd_gym.serving.batcher", "sd_gym.serving.grouping", "sd_gym.serving.dial"]


CURVE = """
## Learning curve

On `SD/Classification-TREC-Table-v1`, the most probable decisions on the validation split: mean over three seeds, and
their range. The other learners are grey ([all of them, and the command](../agents.md#learning-curves)).

"""


class Examples(griffe.Extension):
    """Docstrings say ``Example:`` for a doctest; griffe wants ``Examples:``."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of one object."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)


def on_files(files: Files, config: Any) -> None:
    """Add the generated pages."""
    for path, content in {**pages(), **pictures()}.items():
        files.append(File.generated(config, path, content=content))


def on_config(config: Any) -> None:
    """Put the generated pages where the nav names their folder."""
    config.nav = _expanded(config.nav)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links into the repository into links of the site, and file names in their texts into titles."""
    markdown = re.sub(r"\[(?:\.\./|docs/)?(\w+)\.md\]\(", lambda link: f"[{_title(link[1])}](", markdown)
    up = "../" * page.file.src_uri.count("/")
    for sheet, name in SHEETS.items():
        markdown = re.sub(rf"\]\((\.\./)?{sheet}\.md", f"]({up}{name}.md", markdown)
    markdown = re.sub(r"\]\((?:\.\./)?examples/(\w+)\.(?:py|yaml)\)", rf"]({up}examples/\1.md)", markdown)
    markdown = re.sub(r"\]\((?:\.\./)?envs_configs/base\.yaml\)", f"]({up}reference/keys.md)", markdown)
    return re.sub(r"\]\(docs/", f"]({up}", markdown)  # those of README.md


def pages() -> dict[str, str]:
    """All generated pages by path."""
    made = {f"{name}.md": (ROOT / f"{sheet}.md").read_text() for sheet, name in SHEETS.items()}
    heads = {name: page_of(name) for name in _by_family()}
    made["environments/index.md"] = _index(heads)
    made |= {_env_path(name): _env_page(name, heads[name]) for name in heads}
    made |= {f"algorithms/{name}.md": _algorithm_page(name) for name in AGENTS.names()}
    made |= {f"reference/{name}.md": _reference_page(name) for name in MODULES}
    made["reference/keys.md"] = f"# Keys of an env\n\n```yaml\n{(CONFIG_FOLDER / 'base.yaml').read_text()}```\n"
    command = get_command(app)
    commands = get_docs_for_click(obj=command, ctx=command.make_context("sd-gym", ["envs"]), name="sd-gym")
    for name, one in command.commands.items():  # in full, where Typer shortens
        line = (one.help or "").partition("\n\n")[0].replace("\n", " ")
        commands = re.sub(
            rf"^\* `{name}`: .*$",
            lambda _, name=name, line=line: f"* [`{name}`](#sd-gym-{name}): {line}",
            commands,
            flags=re.MULTILINE,
        )
    made["reference/command_line.md"] = commands.replace("# `sd-gym`", "# Command line", 1)
    for file in sorted((ROOT / "examples").glob("*.py")):
        other = file.with_suffix(".yaml")
        extra = f"\n`{other.name}`:\n\n```yaml\n{other.read_text()}```\n" if other.exists() else ""
        made[f"examples/{file.stem}.md"] = f"# {file.stem}.py\n\n```python\n{file.read_text()}```\n{extra}"
    return made


def pictures() -> dict[str, bytes]:
    """The learning curve of each learner, as SVG by path."""
    return {
        f"algorithms/{name}_{theme}.svg": curves_picture(colours, name)
        for name in AGENTS.names()
        if not agent_class(name).is_control
        for theme, colours in THEMES.items()
    }


def _title(page: str) -> str:
    """The heading of a page that is written by hand."""
    file = ROOT / f"{page}.md" if page in SHEETS else ROOT / "docs" / f"{page}.md"
    return file.read_text().partition("\n")[0].removeprefix("# ")


def _expanded(nav: Any) -> Any:
    """The nav with generated pages in place of folders."""
    if isinstance(nav, dict):
        return {title: _expanded(entry) for title, entry in nav.items()}
    if not isinstance(nav, list):
        return nav
    expanded = []
    for entry in nav:
        expanded += _nav_of(entry) if isinstance(entry, str) and entry.endswith("/") else [_expanded(entry)]
    return expanded


def _nav_of(folder: str) -> list[Any]:
    if folder == "environments/":
        names = _by_family()
        return [{family: [{_short(n): _env_path(n)} for n in own]} for family, own in groupby(names, _family)]
    if folder == "algorithms/":
        kinds = {"Learn": [], "Controls": []}
        for name in AGENTS.names():
            kinds["Controls" if agent_class(name).is_control else "Learn"].append(f"algorithms/{name}.md")
        return [{kind: own} for kind, own in kinds.items()]
    if folder == "examples/":
        return [{"Examples": [f"examples/{file.stem}.md" for file in sorted((ROOT / "examples").glob("*.py"))]}]
    names = ["command_line", "keys", *MODULES]
    return [f"{folder}{name}.md" for name in names]


def _by_family() -> list[str]:
    return sorted(all_ids(), key=_family)


def _family(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.split("/")[1].split("-")[0])


def _short(name: str) -> str:
    """An id without its family."""
    return name.removeprefix("SD/").partition("-")[2] if name != "SD/Table-v0" else "Table-v0"


def _env_path(name: str) -> str:
    return f"environments/{name.removeprefix('SD/')}.md"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _plain(text: str) -> str:
    """A docstring's text as Markdown."""
    return text.replace("``", "`")


def _made(name: str) -> Any:
    """The env, where neither data nor a model have to be loaded from elsewhere."""
    is_mini = "-Mini-" in name and "Table" not in name
    is_here = is_mini or name in SERVING or name in shipped_tables()
    return gym.make(name, **(FEW if is_mini else {})).unwrapped if is_here else None


INDEX = """# Environments

All ids begin with `SD/`. `sd-gym envs ENV` prints the head of a page. The horizon is the number of decisions in an
episode. With a horizon of 1 an env is a contextual bandit.
"""
HEADROOM = """
## Headroom

FLOPs of three references on the test rows, at the env's epsilon: the best mixture of masks
([hull](../concepts.md)), the learner that knows all outcomes of the policy rows, and the oracle. Between hull and
oracle is what a policy can gain. The other envs take their backbone from elsewhere.
"""


def _index(heads: dict[str, Page]) -> str:
    """The page that lists all envs."""
    text, headroom = INDEX, []
    for family, names in groupby(_by_family(), _family):
        rows = []
        for name in names:
            facts, env = heads[name].facts, _made(name)
            page = _env_path(name).split("/")[1]
            data = facts["data set"].split(",")[0]
            link = f"[{_short(name)}]({page})"
            rows.append([link, data, facts["backbone"], _horizon(facts), _switches(facts, env)])
            link = f"[{name.removeprefix('SD/')}]({page})"
            if "-Table-" in name and name not in SERVING:
                headroom.append([link, *_references(name, env)])
            elif facts["backbone"] == "mini":
                headroom.append([link, f"{_mini_quality(facts['task']):.1%}", "-", "-", "-"])
        text += f"\n## {family}\n\n{_table(['env', 'data', 'backbone', 'horizon', 'switches'], rows)}"
    return text + HEADROOM + "\n" + _table(["env", "dense quality", "hull", "full information", "oracle"], headroom)


def _horizon(facts: dict[str, str]) -> str:
    """Decisions of an episode."""
    if facts["task"] == "serving":
        return "one per group"
    stages = facts["stages"]
    return {"every_layer": "one per layer", "of the table": "of the table"}.get(stages, str(len(stages.split(", "))))


def _switches(facts: dict[str, str], env: Any) -> str:
    if hasattr(env, "core"):
        return str(env.core.n_switches)
    of_yours = "of the table" if facts.get("stages", "of the table") == "of the table" else "of the model"
    return str(BART.get(facts["backbone"], of_yours))


def _mini_quality(task: str) -> float:
    """Of the dense bundled backbone: the mean over the levels of difficulty."""
    levels = json.loads((ROOT / "sd_gym/backbones/mini/quality.json").read_text())[task]
    return float(np.mean(list(levels.values())))


def _references(name: str, env: Any) -> list[str]:
    """Dense quality, and the FLOPs of the references at epsilon."""
    split = env.core.split("test")
    dense = split.scoring.of_masks(np.arange(len(split)))[:, 0].mean()
    known = json.loads((table_folder(shipped_tables()[name]) / "references.json").read_text())
    return [f"{dense:.1%}", *(f"{known[key][-1]:.1%}" for key in ("hull", "full_information", "oracle"))]


def _decided(name: str) -> str:
    """A random decision of an env that can be made here, as HTML."""
    env, is_table = gym.make(name, **({} if name in shipped_tables() else FEW)), name in shipped_tables()
    env.action_space.seed(2)
    _, info = env.reset(seed=0)
    over = False
    while not over:
        mask = info.get("action_mask") if is_table else None
        _, reward, over, _, info = env.step(env.action_space.sample(mask))
    core = env.unwrapped.core
    names = core.description["backbone"]["switches"] if is_table else core.backbone.board.names
    share, kept = info["flops_ratio"], "kept" if info["is_success"] else "lost"
    return (
        f'<figure class="decision"><div class="switches">{_cells(names, info["decision"])}</div>'
        f'<div class="flops"><div style="width: {share:.1%}"></div></div>'
        f"<figcaption>A random decision in {name}. Blue ran, grey was skipped: a is attention, c cross-attention, f "
        f"feed-forward. {share:.1%} of the FLOPs, quality {info['quality']:g} (dense: {info['quality_ref']:g}), "
        f"{kept}; reward {reward:+.2f}.</figcaption></figure>\n"
    )


def _cells(names: list[str], decision: Sequence[int]) -> str:
    """A cell per switch, by stack and layer."""
    text = ""
    cells = zip((name.split(".") for name in names), decision, strict=False)  # without the token level
    for stack, layers in groupby(cells, lambda cell: cell[0][0]):
        text += f"<div>{stack}</div><div>"
        for _, layer in groupby(layers, lambda cell: cell[0][1]):
            tags = ((LETTERS[name[2]], "s" if skip else "b") for name, skip in layer)
            text += f"<span>{''.join(f'<{tag}>{letter}</{tag}>' for letter, tag in tags)}</span>"
        text += "</div>"
    return text


def _queue(name: str) -> str:
    """The first groups of a serving env, with a bolder point the longer the queue, as HTML."""
    env = gym.make(name)
    observation, _ = env.reset(seed=0)
    bars = ""
    for _ in range(160):
        point = min(int(4 * observation[0]), env.action_space.n - 1)
        bars += f'<i class="point{point}" style="height: {min(100, 50 * observation[0]):.0f}%"></i>'
        observation, *_ = env.step(point)
    return (
        f'<figure class="decision"><div class="queue">{bars}</div><figcaption>The first 160 groups of {name}. Height: '
        "waiting requests. Colour: the chosen operating point, grey for dense, then darker for bolder. Here a rule "
        "chooses by the length of the queue.</figcaption></figure>\n"
    )


@lru_cache
def _decision(name: str) -> str:
    """The picture of a decision: of the env, or of the Mini env with the same task and stages."""
    if name == "SD/Table-v0":
        return ""
    if name in SERVING:
        return _queue(name)
    if name in shipped_tables() or "-Mini-" in name:
        return _decided(name)
    staged = "Staged-" if "-Staged-" in name else ""
    return _decision(f"{name.split('-')[0]}-Mini-{staged}v0")


def _space(space: gym.Space) -> str:
    """A space in one line, runs of equal numbers in short."""
    if not isinstance(space, gym.spaces.MultiDiscrete):
        return str(space)
    runs = [f"[{value}] * {len(list(run))}".removesuffix(" * 1") for value, run in groupby(space.nvec.tolist())]
    return f"MultiDiscrete({' + '.join(runs)})"


def _sections(cls: type) -> dict[str, str]:
    """The fixed sections of an env's docstring."""
    parts = re.split(r"\n(\w[\w ]*):\n", f"\n{inspect.cleandoc(cls.__doc__ or '')}")
    return {title: inspect.cleandoc(f"\n{body}") for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def _env_page(name: str, found: Page) -> str:
    """The page of an env: its YAML file, and the docstring of its class."""
    env, values = _made(name), found.facts
    module, _, class_name = gym.spec(name).entry_point.partition(":")
    cls = getattr(importlib.import_module(module), class_name)
    sections = {title: _plain(text) for title, text in _sections(cls).items()}
    if values.get("stages") == "first":  # docs/stages.md has the rest
        for title, text in sections.items():
            parts = text.split("\n\n")
            sections[title] = "\n\n".join(part for part in parts if not part.startswith("With several"))
    needed = {key: key for key, fact in (("dataset", "data set"), ("backbone", "backbone")) if values[fact] == "yours"}
    needed = {"table": "table"} if name == "SD/Table-v0" else needed
    arguments = "".join(f', {key}="my-{value}"' for key, value in needed.items())
    sections["Arguments"] = re.sub(r"^(\w+): ", r"- `\1`: ", sections["Arguments"], flags=re.MULTILINE)
    own = (SERVING.find(name) if name in SERVING else config_of(name)).read_text()
    sections["Arguments"] += f"\n\nThe env's own file ([all keys](../reference/keys.md)):\n\n```yaml\n{own}```"
    if env:
        sections["Action Space"] = f"`{_space(env.action_space)}`\n\n{sections['Action Space']}"
        sections["Observation Space"] = f"`{_space(env.observation_space)}`\n\n{sections['Observation Space']}"
    if found.versions:
        sections["Version History"] = "\n".join(f"- {line}" for line in found.versions)
    about = re.sub(r"docs/(\w+)\.md", r"[\1.md](../\1.md)", found.about)
    text = f"# {name}\n\n{about}\n\n{_table(['', ''], [[fact, value] for fact, value in values.items()])}\n"
    text += f'```python\nimport gymnasium as gym\nimport sd_gym\n\nenv = gym.make("{name}"{arguments})\n```\n'
    text += f"\n{_decision(name)}"
    for title in SECTIONS.split(", "):
        text += f"\n## {title}\n\n{sections[title]}\n"
    short = name.removeprefix("SD/").split("-Table-")[0].removeprefix("Classification-")
    return text + _results(lambda cells: cells[0] == name or ("-Table-v" in name and cells[0] == short))


def _results(wanted: Any) -> str:
    """The rows of the results' tables for which ``wanted`` holds, with their headers."""
    text = ""
    for page in ("results", "results_answer"):
        for part in (ROOT / "docs" / f"{page}.md").read_text().split("\n## ")[1:]:
            lines = [
                [cell.strip() for cell in row.strip("|").split(" | ")] for row in part.splitlines() if row[:1] == "|"
            ]
            rows = [cells for cells in lines[2:] if wanted(cells)]
            if rows:
                title = part.splitlines()[0]
                text += f"\n### [{title}](../{page}.md)\n\n{_table(lines[0], rows)}"
    return f"\n## Reference results\n{text}" if text else ""


def _algorithm_page(name: str) -> str:
    """The page of an algorithm: what it does, its settings, its results."""
    cls = agent_class(name)
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    notes = {}
    for base in reversed(cls.Settings.__mro__):
        doc = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:")[2]
        notes |= dict(re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", doc, flags=re.MULTILINE))
    fields = cls.Settings.model_fields.items()
    rows = [[f"`{key}`", f"`{field.default}`", _plain(" ".join(notes.get(key, "").split()))] for key, field in fields]
    text = f"# {name}\n\n{_plain(inspect.getdoc(cls) or '')}\n\n{_plain(module.partition(chr(10))[2])}\n\n"
    env = WHERE.get(name, "SD/Classification-TREC-Table-v1")
    text += f"```bash\nsd-gym train {env} --algo {name}\n```\n"
    if not cls.is_control:
        text += CURVE + "".join(f"![{name}]({name}_{theme}.svg#gh-{theme}-mode-only)\n" for theme in THEMES)
    text += _results(lambda cells: name in cells[1].split()[:1])
    if not rows:
        return text
    text += "\n## Settings\n\nSet one with `--set name=value`, or as a keyword of `sd_gym.train`.\n\n"
    return text + _table(["setting", "default", "meaning"], rows)


def _reference_page(name: str) -> str:
    """The reference of a module: its public names, where they are defined."""
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None) or [key for key in vars(module) if not key.startswith("_")]
    text = f"# {name}\n\n{_plain(inspect.getdoc(module) or '')}\n"
    for key in public:
        member = getattr(module, key)
        if not (inspect.isclass(member) or inspect.isfunction(member)):
            continue
        if member.__module__ == name or (hasattr(module, "__all__") and member.__module__.startswith("sd_gym.")):
            text += f"\n::: {member.__module__}.{member.__qualname__}\n"
    return text

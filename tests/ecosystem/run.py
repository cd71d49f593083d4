"""Run the test of every library beside this file, each in a venv of its own; a table at the end.

    python tests/ecosystem/run.py                       # all; minutes, and some gigabytes in a temporary folder
    python tests/ecosystem/run.py --only minari skrl
    python tests/ecosystem/run.py --folder venvs        # keep the venvs and logs there, for the next time

The Python that runs this has sd_gym and its ``test`` extra. The venvs see its packages after their own, so that only
what a library needs besides, or in another version, is installed.

A file ``test_NAME.py`` is all that a library needs here. It begins with ``PINS = [...]``, what pip installs, and
``pytest.importorskip``. Where the library's own pins forbid it, ``IMPOSSIBLE = "requires ..."`` says which instead.
"""

from __future__ import annotations

import argparse
import ast
import os
import site
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def libraries() -> dict[str, Path]:
    """The test file of each library, by name."""
    return {file.stem.removeprefix("test_"): file for file in sorted(HERE.glob("test_*.py"))}


def constants(file: Path) -> dict[str, object]:
    """``PINS`` and ``IMPOSSIBLE`` of a test file; it is read, not imported, since its library is not there."""
    known = {}
    for statement in ast.parse(file.read_text()).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="PINS" | "IMPOSSIBLE" as name)], value=value):
                known[name] = ast.literal_eval(value)
    return known


def make_venv(folder: Path) -> str:
    """A venv that sees the packages of this Python after its own; returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
        (packages / "shared.pth").write_text("".join(lines))
    return str(python)


def check(name: str, folder: Path) -> tuple[str, str]:
    """(versions, result) of a library; the result is ``runs``, ``not possible: ...`` or ``FAILED: ...``."""
    file = libraries()[name]
    said = constants(file)
    pins = said.get("PINS", [])
    if "IMPOSSIBLE" in said:
        return " ".join(pins), f"not possible: {said['IMPOSSIBLE']}"
    python = make_venv(folder / name)
    log = folder / f"{name}.log"
    test = [python, "-m", "pytest", "-q", "-m", "slow or not slow", "-p", "no:cacheprovider", str(file)]
    # Naming what is there already keeps its own pins in force: pip fails where the library's contradict them.
    install = [python, "-m", "pip", "install", "-q", f"sd-gym=={version('sd-gym')}", *pins]
    steps = {"install": install, "test": test}
    with log.open("w") as output:
        for step, command in steps.items():
            # A file whose library cannot be imported skips itself: pytest then exits with 5, which is a failure here.
            code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
            if code != 0:
                print("".join(log.read_text().splitlines(keepends=True)[-40:]))
                return " ".join(pins), f"FAILED: {step}, exit code {code}, see above"
    return " ".join(pins), "runs"


def main() -> int:
    """Run what is asked for, print the table; 1 if a library failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=libraries(), default=list(libraries()))
    parser.add_argument("--folder", type=Path, help="where venvs and logs are kept (a temporary folder)")
    arguments = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.only:
            print(f"{name} ...", flush=True)
            start = time.time()
            rows.append((name, *check(name, folder), f"{time.time() - start:.0f} s"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)))
    return int(any(row[2].startswith("FAILED") for row in rows))


if __name__ == "__main__":
    sys.exit(main())

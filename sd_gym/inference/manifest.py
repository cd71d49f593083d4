"""The folder that ``sd-gym export`` writes: its files, and the manifest that has their hashes."""

from pathlib import Path
from typing import Any, TypeGuard

from sd_gym.files import hash_of, read_json, sha256

MANIFEST, TOKENIZER, WEIGHTS = "sd_gym_onnx.json", "tokenizer.json", "weights.bin"
FORMAT = 7  # which files and graphs a folder has
DECIDE, MODEL, ANSWER = "decide.onnx", "model.onnx", "answer.onnx"  # before the first layer, the model, on the answer


def is_exported(policy: object) -> TypeGuard[str | Path]:
    """Whether ``policy`` is the folder of an exported policy."""
    return isinstance(policy, str | Path) and Path(policy, MANIFEST).is_file()


def own_hash(manifest: dict[str, Any]) -> str:
    """The hash of a manifest without the entry for this hash."""
    files = {name: hashed for name, hashed in manifest["files"].items() if name != MANIFEST}
    return hash_of({**manifest, "files": files})


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an exported folder; FileNotFoundError if a file is missing, ValueError if one was changed."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"no {MANIFEST} in {folder}; expected a folder that sd-gym export wrote")
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    changed = [MANIFEST]
    if isinstance(files, dict) and files.get(MANIFEST) == own_hash(manifest):
        others = {name: hashed for name, hashed in files.items() if name != MANIFEST}
        if missing := [name for name in others if not (folder / name).is_file()]:
            raise FileNotFoundError(f"no {missing[0]} in {folder}; copy the folder again, with all its files")
        changed = [name for name, hashed in others.items() if sha256(folder / name) != hashed]
    if changed:
        remedy = "it was changed or damaged; copy the folder again, or export anew"
        raise ValueError(f"{folder / changed[0]} is not the file that was exported: {remedy}")
    if (found := manifest.get("format")) != FORMAT:
        raise ValueError(f"{folder / MANIFEST}: expected format {FORMAT}, got {found!r}; export anew with this version")
    return manifest

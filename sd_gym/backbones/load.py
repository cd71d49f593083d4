"""Loading a backbone: bundled, from a local folder, or from the Hugging Face hub."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sd_gym.backbones.checks import check_tokenizer, check_weights, positions_of, usable_device
from sd_gym.backbones.heads import Head, head_of, stored_head
from sd_gym.errors import BackboneError, one_line
from sd_gym.files import file_states
from sd_gym.switch import FlopsModel, Switchboard
from sd_gym.switch.architectures import architecture_of

BUNDLED = {"mini": Path(__file__).parent / "mini"}


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model with its tokenizer, switchboard and FLOPs."""

    name: str  # the name that it was loaded by
    model: PreTrainedModel  # in evaluation mode, without gradients
    tokenizer: PreTrainedTokenizerBase
    board: Switchboard  # the model's switchboard
    flops: FlopsModel  # FLOPs as a function of lengths and decisions
    head: Head  # the kind of output

    @cached_property
    def weights(self) -> str:
        """See ``weights_hash``."""
        return weights_hash(self.model)

    @cached_property
    def positions(self) -> int | None:
        """See ``positions_of``; looking for them takes half a millisecond."""
        return positions_of(self.model)

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """See ``Head.forward``."""
        return self.head.forward(self.board, inputs)


def resolve(name: str) -> str:
    """The folder, file or hub id of a backbone's name; FileNotFoundError if a local path does not exist."""
    if name in BUNDLED:
        return str(BUNDLED[name])
    if Path(name).is_dir() or (name.endswith(".gguf") and Path(name).is_file()):
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise FileNotFoundError(
            f"no backbone folder at {name!r}; expected a folder with config.json and model.safetensors, a .gguf file, "
            f"a hub id such as 'facebook/bart-base', or one of the bundled: {', '.join(BUNDLED)}"
        )
    return name


def load_model(
    name: str,
    *,
    head: type[Head] | None = None,
    num_labels: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of a supported architecture, and its tokenizer, from safetensors or GGUF; no remote code runs.

    All weights come from the files, except those of a head that the files lack. These are random: call
    ``torch.manual_seed`` first.

    Args:
        name: Bundled name, local folder, ``.gguf`` file, or hub id.
        head: The wanted head, new if the stored model has another one; ``None``: the stored one.
        num_labels: Number of classes of ``head``, which is new if the stored one has another number.
        dtype: What the model computes in; ``None``: what it is stored in.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub does not have it or cannot be reached.
        UnsupportedArchitectureError: If no switches are known for the architecture.
        BackboneError: If a file, weight, tokenizer or head is missing, damaged or does not fit.
    """
    config, stored, path, file = _read_config(name)
    chosen = head or stored
    if chosen is None:
        raise BackboneError(
            f"the backbone {name!r} ({config.model_type}) has no task head; fine-tune one with "
            f"'sd-gym prepare --backbone {name} --dataset DATA --output FOLDER' and use that folder"
        )
    auto_class, options = chosen.loading(config)
    options |= file or {"use_safetensors": True}
    if num_labels is not None:
        options["num_labels"] = num_labels
    if dtype is not None:  # not Module.to(), which would also round what stays in float32, as rotary frequencies
        options["dtype"] = dtype
    with _backbone_errors(name, "its weights cannot be loaded"):
        model, info = getattr(transformers, auto_class).from_pretrained(
            path, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False, **options
        )
    new_head = num_labels is not None or chosen is not stored
    check_weights(name, model, architecture_of(model.config.model_type), info, new_head=new_head)
    expected = "expected its files beside the weights, as tokenizer.save_pretrained() writes them"
    with _backbone_errors(name, f"its tokenizer cannot be loaded; {expected}"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **file)
        tokenizer("a")  # some damaged files load, but cannot be used
    check_tokenizer(name, model, tokenizer)
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    if file:  # the weights are no longer quantised, so the model is saved like any other
        vars(model.config).pop("quantization_config", None)
        vars(model)["hf_quantizer"] = None
    if model.config.pad_token_id is None:  # decoder-only classifiers find an input's end by it
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@contextmanager
def _backbone_errors(name: str, what: str) -> Iterator[None]:
    """Turn any error of the libraries into a BackboneError of one line."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust, in tokenizers
            raise
        folder = Path(resolve(name))
        if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
            what = (
                "it has its weights as pickles only (pytorch_model.bin), which can run code when they are read; if "
                "you trust them, load them with transformers, save_pretrained(), and pass that folder"
            )
        raise BackboneError(f"the backbone {name!r}: {what} ({one_line(error)})") from error


def head_stored_with(name: str) -> tuple[type[Head] | None, PretrainedConfig]:
    """The head that is stored with a backbone (``None``: no head), and its configuration; see ``load_model``."""
    config, head, *_ = _read_config(name)
    return head, config


def _read_config(name: str) -> tuple[PretrainedConfig, type[Head] | None, str, dict[str, str]]:
    """A backbone's configuration, its stored head, its folder or hub id, and the option that names a GGUF file."""
    path, file = resolve(name), dict[str, str]()
    if path.endswith(".gguf"):
        path, file = str(Path(path).parent), {"gguf_file": Path(path).name}
    folder = Path(path)
    if folder.is_dir() and not file and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {path}; expected a backbone as save_pretrained() writes it")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **file)
    except Exception as error:  # the library raises errors of many kinds
        if folder.is_dir():
            what = path if not file else Path(path) / file["gguf_file"]
            raise BackboneError(f"the backbone {name!r}: {what} cannot be read ({one_line(error)})") from error
        raise FileNotFoundError(
            f"cannot load the backbone {name!r}: it is no local folder, and loading it from the Hugging Face "
            "hub failed. Without network, pass the path of a local copy as backbone=... (on the command line "
            "--backbone, or --set backbone=...)"
        ) from error
    architecture_of(config.model_type)
    architectures = [str(name) for name in config.architectures or []]
    return config, stored_head(config, architectures, generates=bool(file)), path, file


def save_backbone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model and its tokenizer as Hugging Face does; each file appears complete or not at all.

    Raises:
        OSError: If the files cannot be written, as on a full disk.
    """
    temporary = folder / "model.tmp"
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # config.json comes last, so a folder that has it is complete.
        mode = (temporary / "config.json").stat().st_mode
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            if file.is_dir():  # of further chat templates; a folder replaces only an empty one
                shutil.rmtree(folder / file.name, ignore_errors=True)
            else:
                file.chmod(mode)  # safetensors makes files that only their owner can read
            file.replace(folder / file.name)
    except SafetensorError as error:
        raise OSError(f"cannot write the model to {folder} ({one_line(error)}); is the disk full?") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_own_backbone(name: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Backbone:
    """Load a frozen backbone that is not shared, so a policy can be attached to it.

    Raises: see ``load_model`` and ``usable_device``.
    """
    model, tokenizer = load_model(name, dtype=dtype)
    # transformers hides the signature of Module.to
    model.to(usable_device(device)).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    board = Switchboard(model)
    return Backbone(name, model, tokenizer, board, FlopsModel(board), head_of(model))


def load_backbone(name: str, device: str = "cpu") -> Backbone:
    """Load a backbone that all envs share: do not change it. If its files were written again, it is reloaded."""
    return _shared_backbone(name, device, file_states(name))


@lru_cache(maxsize=4)
def _shared_backbone(name: str, device: str, read: tuple[Any, ...]) -> Backbone:
    return load_own_backbone(name, device)


def weights_hash(model: PreTrainedModel) -> str:
    """SHA-256 of a model's weights: see ``hash_of_tensors``."""
    return hash_of_tensors(model.state_dict()).hex()


def hash_of_tensors(tensors: Mapping[str, Tensor], text: str = "") -> bytes:
    """SHA-256 of a text and tensors: their names, types, shapes and values."""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.digest()

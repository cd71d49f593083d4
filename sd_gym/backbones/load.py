"""Loading a backbone: bundled, from a local folder, or from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sd_gym.backbones.checks import BackboneError, check_tokenizer, check_weights, usable_device
from sd_gym.backbones.forward import forward
from sd_gym.errors import one_line
from sd_gym.switch import FlopsModel, Switchboard
from sd_gym.switch.architectures import architecture_of

BUNDLED = {"mini": Path(__file__).parent / "mini"}
Output = Literal["text", "span", "label"]


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model with its tokenizer, switchboard and FLOPs.

    Attributes:
        name: What it was loaded as.
        model: In evaluation mode, without gradients.
        tokenizer: Its tokenizer.
        board: Its switchboard.
        flops: Its FLOPs as a function of lengths and decisions.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    board: Switchboard
    flops: FlopsModel

    @property
    def generates(self) -> bool:
        """Whether it generates its answers rather than classifying."""
        return self.model.can_generate()

    @property
    def causal(self) -> bool:
        """Whether it is a decoder only, which reads a prompt and goes on with it."""
        return self.generates and self.board.architecture.causal

    @property
    def output(self) -> Output:
        """What it gives: a ``text`` that it generates, a ``span`` of the context, or a ``label`` (or score)."""
        return output_of(self.model)

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """As ``sd_gym.backbones.forward.forward``."""
        return forward(self.board, inputs)


def output_of(model: PreTrainedModel) -> Output:
    """What a model's head gives."""
    if model.can_generate():
        return "text"
    return "span" if "ForQuestionAnswering" in type(model).__name__ else "label"


def resolve(name: str) -> str:
    """The folder or hub id that a backbone's name stands for.

    Raises:
        FileNotFoundError: If the name looks like a path and there is no such folder.
    """
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
    name: str, *, num_labels: int | None = None, extracts: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of a supported architecture and its tokenizer; weights only as safetensors, no remote code.

    All weights come from the files, but for those of a head that is asked for and not stored: it is new, drawn from
    torch's random state (call ``torch.manual_seed`` before).

    Args:
        name: Bundled name, local folder, ``.gguf`` file, or hub id.
        num_labels: Put a classification head of that size on the model, new where the stored model has none of
            that size; ``None``: load the head that was stored.
        extracts: Put a head on the model that marks a span of the input, new where the stored model has none.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub does not have it or cannot be reached.
        UnsupportedArchitectureError: If no switches are known for the architecture.
        BackboneError: If a file cannot be read or is missing, weights are missing, of another size or not finite, the
            tokenizer has no words or more than the model, the stored model has no head and none is asked for, or its
            architecture has none of that kind.
    """
    config, path, file = _stored(name)
    stored = _stored_output(config, file)
    options: dict[str, Any] = {**(file or {"use_safetensors": True})}
    if num_labels is not None:
        auto, options["num_labels"] = AutoModelForSequenceClassification, num_labels
    elif extracts or stored == "span":
        if type(config) not in MODEL_FOR_QUESTION_ANSWERING_MAPPING:
            raise BackboneError(f"the architecture {config.model_type!r} has no head that extracts answers")
        # One output for starts and one for ends, whatever a former head had.
        auto, options["num_labels"] = AutoModelForQuestionAnswering, 2
    elif stored == "text":
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    elif stored == "label":
        auto = AutoModelForSequenceClassification
    else:
        raise BackboneError(
            f"the backbone {name!r} ({config.model_type}) has no task head; fine-tune one with "
            f"'sd-gym prepare --backbone {name} --dataset DATA --output FOLDER' and use that folder"
        )
    new_head = num_labels is not None or (extracts and stored != "span")
    model = _load_weights(name, auto, path, new_head, options)
    tokenizer = _load_tokenizer(name, path, file, model)
    if file:  # its weights are ordinary numbers now, so it can be saved as any other
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
    if model.config.pad_token_id is None:  # decoder-only classifiers look for it to find an input's end
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _load_weights(name: str, auto: Any, path: str, new_head: bool, options: dict[str, Any]) -> PreTrainedModel:
    with _explained(name, "its weights cannot be loaded"):
        model, info = auto.from_pretrained(
            path, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False, **options
        )
    check_weights(name, model, architecture_of(model.config.model_type), info, new_head=new_head)
    return model


def _load_tokenizer(name: str, path: str, file: dict[str, str], model: PreTrainedModel) -> PreTrainedTokenizerBase:
    expected = "expected its files beside the weights, as tokenizer.save_pretrained() writes them"
    with _explained(name, f"its tokenizer cannot be loaded; {expected}"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **file)
    check_tokenizer(name, model, tokenizer)
    if tokenizer.pad_token is None:  # padding is masked, so any token does
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Errors of the libraries, which are of many kinds, as one line of our own."""
    try:
        yield
    except Exception as error:
        folder = Path(resolve(name))
        if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
            what = (
                "it has its weights as pickles only (pytorch_model.bin), which can run code when they are read; where "
                "you trust them, load them with transformers, save_pretrained(), and pass that folder"
            )
        raise BackboneError(f"the backbone {name!r}: {what} ({one_line(error)})") from error


def stored_output(name: str) -> Output | None:
    """What the head that is stored with a backbone gives; ``None`` where there is none.

    Raises:
        FileNotFoundError, UnsupportedArchitectureError: As ``load_model``.
    """
    config, _, file = _stored(name)
    return _stored_output(config, file)


def _stored(name: str) -> tuple[PretrainedConfig, str, dict[str, str]]:
    """The configuration of a backbone, its folder or hub id, and the GGUF file in it, if it is one."""
    path, file = resolve(name), {}
    if path.endswith(".gguf"):
        file = {"gguf_file": Path(path).name}
        path = str(Path(path).parent)
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
            f"cannot load the backbone {name!r}: it is no local folder, and the Hugging Face hub did not give it. "
            "Without network, pass the path of a local copy as backbone=..."
        ) from error
    architecture_of(config.model_type)
    return config, path, file


def _stored_output(config: PretrainedConfig, file: dict[str, str]) -> Output | None:
    heads = {
        "ForConditionalGeneration": "text",
        "ForCausalLM": "text",
        "LMHeadModel": "text",
        "MTModel": "text",  # Marian
        "ForQuestionAnswering": "span",
        "ForSequenceClassification": "label",
    }
    found = [output for head, output in heads.items() if head in " ".join(map(str, config.architectures or []))]
    return found[0] if found else "text" if file else None


def save_backbone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer as Hugging Face does; each file appears complete or not at all."""
    temporary = folder / "model.tmp"
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    # The configuration comes last: a folder that has it is complete.
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)
    temporary.rmdir()


@lru_cache(maxsize=4)
def load_backbone(name: str, device: str = "cpu") -> Backbone:
    """Load a frozen backbone, ready to be switched; loaded once a process, since it never changes.

    Raises:
        As ``load_model`` and ``usable_device``.
    """
    model, tokenizer = load_model(name)
    model = model.to(usable_device(device)).eval().requires_grad_(False)
    board = Switchboard(model)
    return Backbone(name, model, tokenizer, board, FlopsModel(board))

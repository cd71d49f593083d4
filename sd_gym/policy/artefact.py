"""A learned policy as files, complete: deciding needs no env, no data set and no code of your own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, snapshot_download
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sd_gym.backbones.heads import head_of
from sd_gym.backbones.load import BUNDLED, weights_hash
from sd_gym.errors import one_line
from sd_gym.files import hash_of, read_tensors, write_arrays, write_text
from sd_gym.going_on import ANSWER, stages_of_pass
from sd_gym.operating_points import OperatingPoint, margin_for
from sd_gym.policy.card import FILE, FILES, TENSORS, model_card, read_card, write_card
from sd_gym.policy.features import pooled_features, token_observations
from sd_gym.policy.network import DecisionPolicy
from sd_gym.policy.observations import Observations
from sd_gym.policy.table_export import TablePolicy
from sd_gym.policy.token_rule import TokenRule
from sd_gym.projection import standardised
from sd_gym.switch import (
    FlopsModel,
    Switchboard,
    attention_received,
    first_layer_input,
    keep_tokens,
    position_scores,
    rarity_scores,
)
from sd_gym.switch.switchboard import board_on

PROBE = "The CAFÉ's Straße  costs 1,234.50 ﬁne € in 東京 😀"  # a text that tokenizers read in different ways
TOKEN_STATISTICS = ("token_mean", "token_deviation")  # names of tensors


@dataclass(frozen=True, eq=False, repr=False)
class SkipPolicy:
    """A policy that decides on raw inputs as it did in its env.

    Attributes:
        network: Maps observations to decisions; if trained on a table, to those of the original env.
        mean: Mean of the observations on the training split: float32 ``[features]``; of tokens ``[width]``; at stages
            ``[stages, features]``.
        deviation: Their standard deviation, of the same shape.
        rarity: ``inverse_document_frequency`` by token id, if tokens are ranked by it; else ``None``.
        protection: Which tokens are never dropped; ``None`` if no rule gives them, or no token is dropped.
        operating_points: Tested versions and dense, the one that skips most first.
        card: What it was trained on, and its result: ``env`` (the config), ``backbone``, ``result``, ``run``.
        token_statistics: Mean and deviation ``[width]`` of tokens, if several stages show them.
        ranking_costs_flops: Whether the first attention runs to rank tokens, by the attention that each receives.
        context: Which tokens are not the context of a question, if answers are spans and it has the answer stage;
            ``None`` if no rule gives them.
    """

    network: DecisionPolicy | TablePolicy
    mean: NDArray
    deviation: NDArray
    rarity: NDArray | None
    protection: TokenRule | None
    operating_points: tuple[OperatingPoint, ...]
    card: dict[str, Any]
    token_statistics: tuple[NDArray, NDArray] | None = None
    ranking_costs_flops: bool = False
    context: TokenRule | None = None

    def __repr__(self) -> str:
        """One line: the env, the backbone, and among how many operating points it can be chosen."""
        env, backbone = (self.card.get(part, {}) for part in ("env", "backbone"))
        of_env = f"{env.get('id')} on {backbone.get('name')}"
        return f"SkipPolicy({of_env}, {len(self.network.switches)} switches, {len(self.operating_points)} points)"

    @property
    def learned(self) -> DecisionPolicy:
        """The network that was trained, on a table or not."""
        return self.network.network if isinstance(self.network, TablePolicy) else self.network

    @property
    def token_shares(self) -> tuple[float, ...]:
        """The share of the tokens that each token level drops."""
        return tuple(self.card["env"]["tokens"]["shares"])

    @property
    def max_source_length(self) -> int:
        """Most tokens of a text in its env; a policy that observes tokens reads no more."""
        return self.card["env"]["backbone"]["max_source_length"]

    @property
    def is_staged(self) -> bool:
        """Whether it decides during the pass (``StagedRollout``), not only before the first layer."""
        return self.network.stages != ["first"]

    @property
    def has_answer_stage(self) -> bool:
        """Whether its last stage is ``answer``: to accept the answer, or to go on."""
        return self.network.stages[-1] == ANSWER

    @property
    def stages_of_pass(self) -> list[str]:
        """Names of the stages of the pass at which it decides."""
        return stages_of_pass(self.network.stages)

    @property
    def decides_first(self) -> bool:
        """Whether all its masks are known before the first layer."""
        return self.stages_of_pass == ["first"]

    def decide(self, board: Switchboard, inputs: dict[str, Tensor]) -> NDArray:
        """Decisions, int64 ``[n, switches + 1]``, on the model's inputs ``[n, length]``, padded at the right."""
        return self.decide_on(first_layer_input(board, inputs), inputs["attention_mask"])

    def decide_on(self, hidden: Tensor, mask: Tensor, *, unpadded: bool = False) -> NDArray:
        """Decisions, int64 ``[n, switches + 1]``; arguments and errors are those of ``observed``."""
        return self.network.decide(self.observed(hidden, mask, unpadded=unpadded))

    def observed(self, hidden: Tensor, mask: Tensor, *, unpadded: bool = False) -> Observations | Tensor:
        """The observation before the first layer; it is the same for all versions of the policy (``with_margin``).

        Args:
            hidden: The first layer's input, ``[n, length, width]``, padded at the right.
            mask: Mask of its tokens, ``[n, length]``.
            unpadded: Whether there is no padding, which is faster.

        Raises:
            ValueError: If it decides at stages of the pass.
        """
        if self.is_staged:
            raise ValueError(
                f"this policy decides during the pass, at {', '.join(self.network.stages)}, not before it; attach it "
                "to its model, or call sd_gym.load(policy)(texts)"
            )
        if self.network.channels is not None:
            return token_observations(hidden, mask, self.mean, self.deviation, self.max_source_length)
        features = pooled_features(hidden, None if unpadded else mask)
        mean, deviation = (torch.from_numpy(values).to(features.device) for values in (self.mean, self.deviation))
        return standardised(features, mean, deviation)

    def kept(self, board: Switchboard, inputs: dict[str, Tensor], level: NDArray) -> Tensor | None:
        """Which tokens stay at the token levels ``[n]``, bool ``[n, length]``; ``None``: all.

        Raises:
            ValueError: If no rule gives the protected tokens.
        """
        if not level.any():
            return None
        droppable = _selected(self.protection, inputs).cpu().numpy()
        keep = keep_tokens(self._token_scores(board, inputs), droppable, np.array(self.token_shares)[level])
        return torch.from_numpy(keep).to(inputs["input_ids"].device)

    def context_of(self, inputs: dict[str, Tensor]) -> Tensor:
        """Which tokens of inputs padded at the right may be in an answer, bool ``[n, length]``; raises as ``kept``.

        They are the context of the question; the first token stands for no answer, if questions may have none.
        """
        context = _selected(self.context, inputs)
        context[:, 0] = self.card["env"]["data"]["unanswerable"]
        return context

    def _token_scores(self, board: Switchboard, inputs: dict[str, Tensor]) -> NDArray:
        if self.ranking_costs_flops:
            return attention_received(board, inputs).float().cpu().numpy()
        ids = inputs["input_ids"].cpu().numpy()
        if self.rarity is None:
            return position_scores((len(ids), ids.shape[1]))
        return rarity_scores(ids, inputs["attention_mask"].cpu().numpy().astype(bool), self.rarity)

    def ranking_flops(self, flops: FlopsModel, length: NDArray, drops: NDArray) -> NDArray:
        """FLOPs of ranking the tokens of inputs of ``length [n]``, where ``drops [n]`` is true, int64 ``[n]``."""
        if not self.ranking_costs_flops or not drops.any():
            return np.zeros_like(length)
        return np.where(drops, flops.first_attention(length), 0)

    def at(self, *, max_loss: float | None = None, max_flops: float | None = None) -> SkipPolicy:
        """The policy at another operating point; arguments and errors are those of ``margin_for``."""
        margin = margin_for(self.operating_points, max_loss=max_loss, max_flops=max_flops)
        return self.with_margin(margin) if margin else self

    def with_margin(self, margin: float) -> SkipPolicy:
        """A version that skips only where it prefers skipping by ``margin`` more; the operating points shift."""
        operating_points = tuple(point._replace(margin=point.margin - margin) for point in self.operating_points)
        return replace(self, network=self.network.with_margin(margin), operating_points=operating_points)

    def check_model(self, model: PreTrainedModel, *, weights: bool = True) -> None:
        """Raise ``ValueError`` if a model, or its weights, differ from those that this policy was trained on."""
        backbone = self.card["backbone"]
        if (got := model.config.model_type) != backbone["model_type"]:
            raise ValueError(f"this policy is for a {backbone['model_type']} ({backbone['name']}), got a {got}")
        with switchboard_of(model) as board:
            width, names = model.config.hidden_size, board.names
            pooled = 2 * width + 2
            if self.is_staged:
                try:
                    board.decided_at(self.stages_of_pass)
                except ValueError as error:
                    raise ValueError(f"this policy decides at stages of {backbone['name']}: {error}") from error
                head = head_of(model)
                width = pooled + len(self.network.stages) + 1 + head.can_exit(board)
                width += len(head.judgement) * self.has_answer_stage
            elif self.network.channels is None:
                width = pooled
        tokens = self.network.token_width in (None, model.config.hidden_size)
        if names != self.network.switches or width != self.network.observation_size or not tokens:
            raise ValueError(
                f"this policy decides on {len(self.network.switches)} switches by {self.network.observation_size} "
                f"features of {backbone['name']}; the model has {len(names)} switches and {width} features"
            )
        if weights and any(value.is_meta for value in model.state_dict().values()):
            raise ValueError(
                "the weights are offloaded, so they cannot be compared with those that this policy was trained on; "
                "attach first, then offload, or pass check_weights=False"
            )
        if weights and weights_hash(model) != backbone["weights"]:
            raise ValueError(
                f"the weights are not those of {backbone['name']} that this policy was trained on, so its quality is "
                "not known; load that backbone, or pass check_weights=False if they differ on purpose (half "
                "precision, quantised)"
            )

    def check_reachable(self) -> None:
        """Raise ``FileNotFoundError`` if the backbone was a local folder in training and is missing here."""
        backbone, name = self.card["backbone"], self.card["backbone"]["name"]
        if backbone["is_local"] and name not in BUNDLED and not Path(name).exists():
            raise FileNotFoundError(
                f"the backbone of this policy, {name!r}, was a local folder in training, which does not exist here; "
                f"pass the path of the same {backbone['model_type']} as backbone=... (--backbone on the command line)"
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ``ValueError`` if a tokenizer is not the policy's."""
        backbone = self.card["backbone"]
        if (got := tokenizer_hash(tokenizer)) != backbone["tokenizer"]:
            raise ValueError(
                f"the tokenizer is not the one of {backbone['name']} that this policy was trained with "
                f"(hash {got[:12]}, expected {backbone['tokenizer'][:12]})"
            )
        hashes = {reading_hash(tokenizer), backbone.get("reading")} - {None}
        if len(hashes) == 2:
            raise ValueError(
                f"the tokenizer has the words of {backbone['name']}, but reads case, accents or spaces otherwise; load "
                "it as it was stored (without do_lower_case, add_prefix_space and the like)"
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy and a model card; each file is complete or missing."""
        folder = Path(folder)
        self.learned.save(folder)
        arrays, table = {"mean": self.mean, "deviation": self.deviation}, None
        if self.token_statistics is not None:
            arrays |= dict(zip(TOKEN_STATISTICS, self.token_statistics, strict=True))
        if self.rarity is not None:
            arrays["rarity"] = self.rarity
        if isinstance(self.network, TablePolicy):
            arrays |= self.network.arrays()
            table = {"nvec": self.network.nvec, "switches": self.network.switches}
        write_arrays(folder / TENSORS, arrays)
        values = {
            "protection": self.protection and self.protection._asdict(),
            "context": self.context and self.context._asdict(),
            "ranking_costs_flops": self.ranking_costs_flops,
            "operating_points": [point._asdict() for point in self.operating_points],
            "table": table,
        }
        write_card(folder, {**values, **self.card})
        write_text(folder / "README.md", model_card(self.card, self.operating_points))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> SkipPolicy:
        """Load a policy that ``save_pretrained`` or a training run wrote.

        Args:
            name: A folder, or the id of a model repository on the Hugging Face hub.
            revision: Revision of the repository.

        Raises:
            FileNotFoundError: If it does not exist.
            ValueError: If its files are damaged or do not belong together.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = _downloaded(str(name), revision)
        if not (folder / FILE).exists():
            raise FileNotFoundError(_why_missing(folder, name))
        card = read_card(folder)
        network, tensors = DecisionPolicy.load(folder), read_tensors(folder / TENSORS)
        table, width = card.pop("table"), network.token_width
        try:
            if table is not None:
                network = TablePolicy.of_files(network, table, tensors)
            shape: tuple[int, ...] = (network.observation_size,)
            if network.stages != ["first"]:
                shape = len(network.stages), network.observation_size - len(network.stages) - 1
            policy = cls(
                network,
                *_statistics_in(tensors, ("mean", "deviation"), shape),
                rarity=_finite(tensors.pop("rarity"), None) if "rarity" in tensors else None,
                protection=card.pop("protection"),
                operating_points=tuple(card.pop("operating_points")),
                token_statistics=None if width is None else _statistics_in(tensors, TOKEN_STATISTICS, (width,)),
                ranking_costs_flops=card.pop("ranking_costs_flops"),
                context=card.pop("context"),
                card=card,
            )
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{folder}: {FILE} and {TENSORS} were not written together by save_pretrained ({one_line(error)})"
            ) from error
        if tensors:
            raise ValueError(f"{folder / TENSORS}: unexpected tensors {sorted(tensors)}; copy the policy again")
        if len(policy.token_shares) != (levels := network.nvec[len(network.switches)]):
            raise ValueError(f"{folder}: the policy has {levels} token levels, {FILE} {len(policy.token_shares)}")
        return policy

    def push_to_hub(self, repository: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the policy to a model repository of the Hugging Face hub, which is created if needed.

        Returns:
            The URL of the commit.
        """
        api = HfApi(token=token)
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id  # with its namespace
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(FILES)).commit_url


def _why_missing(folder: Path, name: str | Path) -> str:
    """Why a folder has no policy, and what to do."""
    if (folder / "dial.json").exists():
        return f"the run {name} has a dial, no policy; pass the run of its policy: sd-gym serve RUN --dial {name}"
    if (folder / "result.json").exists():
        return (
            f"the run {name} has no {FILE} (its policy needs its env: a control, an own observation or token ranking, "
            "random tokens, or a staged table in one stage); sd-gym evaluate takes it"
        )
    return f"no {FILE} in {name}; expected the folder of a training run, or one that save_pretrained wrote"


def _downloaded(name: str, revision: str | None) -> Path:
    """The folder of a local copy of a policy on the hub; ``FileNotFoundError`` if the download fails."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {name!r}; expected one with {FILE}, or the id of a repository on the hub")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the hub raises many kinds of errors
        raise FileNotFoundError(
            f"no folder {name!r}, and the download from the Hugging Face hub failed ({type(error).__name__}); without "
            "network, pass the path of a local copy"
        ) from error


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's vocabulary and special tokens."""
    return hash_of([sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))])


def reading_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the tokens that a tokenizer reads in a text of its words, accents and spaces; ``None``: it is slow.

    The parts of the tokenizer are called one by one, as a call of the whole would change its truncation.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    words = sorted(tokenizer.get_vocab())
    some = " ".join(words[:: max(1, len(words) // 64)])
    text = f" \n{PROBE} {some} {some.upper()}\n "
    text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    pieces = [(text,)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
    return hash_of([token.id for piece in pieces for token in backend.model.tokenize(piece[0])])


@contextmanager
def switchboard_of(model: PreTrainedModel) -> Iterator[Switchboard]:
    """The switchboard of a model; a new one is removed on exit."""
    existing = board_on(model)
    board = existing or Switchboard(model)
    try:
        yield board
    finally:
        if existing is None:
            board.remove()


def _selected(rule: TokenRule | None, inputs: dict[str, Tensor]) -> Tensor:
    if rule is None:
        raise ValueError(
            "the tokens alone do not show which of them this policy may drop, or which are the context of a "
            "question; call it on texts, sd_gym.load(policy)(texts)"
        )
    return rule.selects(inputs["input_ids"], inputs["attention_mask"])


def _statistics_in(
    tensors: dict[str, Tensor], names: tuple[str, str], shape: tuple[int, ...]
) -> tuple[NDArray, NDArray]:
    """The mean and deviation with these names, removed from the tensors."""
    mean, deviation = (_finite(tensors.pop(name), shape) for name in names)
    if not (deviation > 0).all():
        raise ValueError(f"expected {names[1]} above 0, got {deviation.min()}")
    return mean, deviation


def _finite(tensor: Tensor, shape: tuple[int, ...] | None) -> NDArray:
    fits = tensor.ndim == 1 if shape is None else tensor.shape == shape
    if not fits or not tensor.isfinite().all():
        raise ValueError(f"expected finite numbers of shape {list(shape or ['n'])}, got {list(tensor.shape)}")
    return tensor.numpy()

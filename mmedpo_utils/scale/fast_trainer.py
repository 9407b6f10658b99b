"""`trainer.MMedPOTrainer` in about half the time: the same losses and gradients.

Four savings. Both answers of a text pair stand in one row, so that image and prompt are read once
(`shared_prefix`). Each different image of a batch is encoded once, and the output layer sees answer
positions alone. Long rows of a large batch are read apart from the short ones, which would be
padded to their length (`halves`). The reference log-probabilities, which never change, are computed
once and kept on disk. All are switched in here, by hooks on the model, so that DeepSpeed still sees
forward passes of the whole model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import ModelOutput

from ..base.errors import InputError
from ..base.files import read_sealed, write_sealed
from ..trainer import MMedPOTrainer, PreferenceCollator
from .shared_prefix import (
    PREFIX_ATTENTION,
    PackedRow,
    attention_mask,
    block_mask,
    first_branching,
    pack,
)

SPLIT_PAIRS = 8  # from as many pairs on, a batch is read in two parts


@cache
def _image_digest(path: str, size: int, changed: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def pair_key(pair: dict[str, Any], max_length: int) -> str:
    """What decides the reference log-probabilities of a pair besides the model: tokens and images,
    as SHA-256 (hexadecimal).
    """
    parts = [max_length, pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]]
    for image in (pair["image"], pair["rejected_image"]):
        found = Path(image).stat()
        parts.append(_image_digest(image, found.st_size, found.st_mtime_ns))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass
class PackedBatch(ModelOutput):
    """B pairs in R rows, with the places of their N answer tokens.

    The answers' owners are 0..B-1 (chosen) and B..2B-1 (rejected).
    """

    input_ids: torch.Tensor | None = None  # [R, T]
    position_ids: torch.Tensor | None = None  # [R, T]
    branches: torch.Tensor | None = None  # [R, T] 0: prompt or padding, n: a row's n-th answer
    answer_rows: torch.Tensor | None = None  # [N] the row of each answer token
    answer_positions: torch.Tensor | None = None  # [N] where it is predicted from
    answer_ids: torch.Tensor | None = None  # [N] the token
    answer_owners: torch.Tensor | None = None  # [N] whose it is
    pixel_values: torch.Tensor | None = None  # [I, 3, H, W] the different images
    image_rows: torch.Tensor | None = None  # [R] each row's image
    weights: torch.Tensor | None = None  # [B] normalised relevance s'
    visual: torch.Tensor | None = None  # [B] 1 for a visual pair, 0 for a text pair
    chosen_lengths: torch.Tensor | None = None  # [B] tokens of the chosen answer
    tokens: torch.Tensor | None = None  # [B] tokens that the model reads of the pair
    pair_keys: list[str] | None = None  # of each pair, see `pair_key`
    row_lengths: list[int] | None = None  # [R] without padding; None: one forward pass


@dataclass
class PackingCollator(PreferenceCollator):
    """Batches of pairs, from rows of `trainer.preference_dataset`, each different image once.

    With ``shared_prefix`` a pair whose two images are the same is one row, otherwise every pair is
    two rows::

        {prompt_ids: [1, 2, 3], chosen_ids: [7], rejected_ids: [8, 9], one image}

        input_ids      1 2 3 7 8 9
        position_ids   0 1 2 3 3 4     the second answer, too, follows the prompt
        branches       0 0 0 1 2 2     an answer sees branch 0 and its own

    Each answer is cut where prompt and answer reach ``max_length``, in both layouts. With dropout
    the two layouts draw different masks: two answers of one row share those of their prompt.
    """

    shared_prefix: bool = True

    def rows(
        self, pair: dict[str, Any], chosen: int = 0, rejected: int = 1
    ) -> list[tuple[PackedRow, str]]:
        """The rows of a pair, each with its image's path; ``chosen`` and ``rejected`` name the
        answers' owners.
        """
        prompt = pair["prompt_ids"]
        room = self.max_length - len(prompt)
        chosen_answer = (chosen, pair["chosen_ids"][:room])
        rejected_answer = (rejected, pair["rejected_ids"][:room])
        if self.shared_prefix and pair["image"] == pair["rejected_image"]:
            both = PackedRow(prompt, [chosen_answer, rejected_answer])
            return [(both, pair["image"])]
        return [
            (PackedRow(prompt, [chosen_answer]), pair["image"]),
            (PackedRow(prompt, [rejected_answer]), pair["rejected_image"]),
        ]

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> PackedBatch:
        """Collate B pairs."""
        rows = []
        row_images = []
        places: dict[str, int] = {}  # of each image among the different ones
        tokens = []
        chosen_lengths = []
        for number, pair in enumerate(pairs):
            of_pair = self.rows(pair, chosen=number, rejected=len(pairs) + number)
            for row, image in of_pair:
                rows.append(row)
                row_images.append(places.setdefault(image, len(places)))
            tokens.append(sum(len(row) for row, _ in of_pair))
            _, chosen = of_pair[0][0].answers[0]
            chosen_lengths.append(len(chosen))
        return PackedBatch(
            **pack(rows, self.pad_token_id),
            pixel_values=torch.stack([self.pixels(image) for image in places]),
            image_rows=torch.tensor(row_images),
            weights=torch.tensor([pair["weight"] for pair in pairs]),
            visual=torch.tensor([float(pair["visual"]) for pair in pairs]),
            chosen_lengths=torch.tensor(chosen_lengths),
            tokens=torch.tensor(tokens),
            pair_keys=[pair_key(pair, self.max_length) for pair in pairs],
            row_lengths=[len(row) for row in rows],
        )


def halves(batch: Any) -> list[Any]:
    """The short rows and the long ones, each cut to their own longest, where that saves the most
    padding; a `PackedBatch` of fewer than eight pairs stays whole.

    A single report among short answers would make every row as long as itself. The number of parts
    depends on the number of pairs alone, which all processes have in common: with ZeRO stage 3 they
    must make as many forward passes.
    """
    lengths = batch.row_lengths
    if lengths is None or len(batch.weights) < SPLIT_PAIRS:
        return [batch]
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    longest = lengths[order[-1]]
    read = [
        short * lengths[order[short - 1]] + (len(order) - short) * longest
        for short in range(1, len(order))
    ]
    short = 1 + read.index(min(read))
    return [_part(batch, rows) for rows in (order[:short], order[short:])]


def _part(batch: Any, rows: list[int]) -> PackedBatch:
    """Some rows of a batch, with their answer tokens and images."""
    length = max(batch.row_lengths[row] for row in rows)
    index = torch.tensor(rows, device=batch.input_ids.device)
    place = torch.full_like(batch.image_rows, -1)
    place[index] = torch.arange(len(rows), device=index.device)
    answers = place[batch.answer_rows] >= 0
    images, image_rows = batch.image_rows[index].unique(return_inverse=True)
    return PackedBatch(
        input_ids=batch.input_ids[index, :length],
        position_ids=batch.position_ids[index, :length],
        branches=batch.branches[index, :length],
        answer_rows=place[batch.answer_rows[answers]],
        answer_positions=batch.answer_positions[answers],
        answer_ids=batch.answer_ids[answers],
        answer_owners=batch.answer_owners[answers],
        pixel_values=batch.pixel_values[images],
        image_rows=image_rows,
    )


def spread_images(
    model: torch.nn.Module, arguments: tuple, options: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Hook before the LLaVA model's forward: encode each different image once, give every row its
    own by ``image_rows`` [R].
    """
    rows = options.pop("image_rows", None)
    if rows is not None:
        images = model.get_image_features(options.pop("pixel_values"), return_dict=True)
        images.pooler_output = list(torch.stack(images.pooler_output)[rows])
        options["mm_encoder_outputs"] = {"image": images}
    return arguments, options


def keep_answers(_: torch.nn.Module, __: tuple, options: dict[str, Any], output: Any) -> Any:
    """Hook after the language model's forward: keep the positions that predict answer tokens,
    [1, N] of [R, T]; lm_head computes no other logits.
    """
    if "answer_rows" in options:
        places = options["answer_rows"], options["answer_positions"]
        output.last_hidden_state = output.last_hidden_state[places][None]
    return output


class ReferenceCallback(TrainerCallback):
    """Computes the reference when training begins: the model is where it trains then, also inside
    DeepSpeed's engine.
    """

    def __init__(self, trainer: FastTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Compute, or read, what `FastTrainer.precompute_reference` gives."""
        self.trainer.precompute_reference()


class FastTrainer(MMedPOTrainer):
    """`MMedPOTrainer` with shared prompts, a cached reference, and logits of answers alone.

    Batches come from `PackingCollator`.

    Args:
        cache_reference: compute the initial reference once, when training begins, instead of in
            every step. A reference that drifts ("released") is never cached.
        reference_cache: JSON file that keeps the reference between runs; one file belongs to one
            model.
        arguments: those of `MMedPOTrainer`.

    Raises:
        InputError: rows share their prompt, and the model's attention reaches less than
            ``max_length`` tokens back; or as `MMedPOTrainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        cache_reference: bool = True,
        reference_cache: Path | None = None,
        **arguments: Any,
    ) -> None:
        self.reference_cache = reference_cache
        self.known_reference: dict[str, list[float]] = {}
        super().__init__(model, **arguments)
        llava = self.model.get_base_model().model
        llava.register_forward_pre_hook(spread_images, with_kwargs=True)
        llava.language_model.register_forward_hook(keep_answers, with_kwargs=True)
        self.attention = self._attention()
        if cache_reference and self.reference == "initial":
            self.add_callback(ReferenceCallback(self))

    def _attention(self) -> str:
        """The attention that fits shared rows, set on the language model."""
        config = self.language_model.config
        window = getattr(config, "sliding_window", None)
        if self.data_collator.shared_prefix and window and window < self.args.max_length:
            raise InputError(
                f"training.shared_prefix: the model's attention window is {window} tokens, fewer "
                f"than `training.max_length` ({self.args.max_length}); set training.shared_prefix "
                "to false"
            )
        if config._attn_implementation == "sdpa":
            self.language_model.set_attn_implementation(PREFIX_ATTENTION)
        return config._attn_implementation

    def row_lengths(self, data: Dataset) -> list[int]:
        """Tokens of each pair's longest row, in the collator's layout."""
        lengths = []
        for pair in data:
            lengths.append(max(len(row) for row, _ in self.data_collator.rows(pair)))
        return lengths

    def compute_logps(
        self, model: torch.nn.Module, batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (sums over answer tokens) of chosen and rejected answers, in one
        forward pass or two (`halves`). Shape: [B] each.
        """
        token_logps = []
        owners = []
        for part in halves(batch):
            outputs = model(
                input_ids=part["input_ids"],
                pixel_values=part["pixel_values"],
                image_rows=part["image_rows"],
                **self._attention_inputs(part),
                answer_rows=part["answer_rows"],
                answer_positions=part["answer_positions"],
                shift_labels=part["answer_ids"][None],
                use_cache=False,
                fused_lm_head=True,  # gives log-probabilities of the labels, and never all logits
            )
            token_logps.append(outputs.log_probs[0])
            owners.append(part["answer_owners"])
        of_tokens = torch.cat(token_logps)  # [N]
        answer_logps = of_tokens.new_zeros(2 * len(batch["weights"]))
        answer_logps = answer_logps.index_add(0, torch.cat(owners), of_tokens)
        chosen_logps, rejected_logps = answer_logps.chunk(2)
        return chosen_logps, rejected_logps

    def _attention_inputs(self, batch: Any) -> dict[str, torch.Tensor]:
        """Mask and positions; none where no row has two answers: padding is on the right, so that
        causal attention is enough.
        """
        branches = batch["branches"]
        start = first_branching(branches)
        if start == branches.shape[1]:
            return {}
        if self.attention == "flex_attention":
            mask = block_mask(branches)
        elif self.attention == PREFIX_ATTENTION:
            mask = attention_mask(branches, start)
        else:
            lowest = torch.finfo(self.model.dtype).min
            seen = attention_mask(branches)
            mask = torch.where(seen, 0.0, lowest).to(self.model.dtype)
        return {"attention_mask": mask, "position_ids": batch["position_ids"]}

    def reference_logps(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of chosen and rejected answers under the reference, from the cache
        where they are known. Shape: [B] each.
        """
        if not self.known_reference:
            return super().reference_logps(batch)
        known = [self.known_reference[key] for key in batch["pair_keys"]]
        chosen_logps, rejected_logps = torch.tensor(known, device=batch["weights"].device).unbind(1)
        return chosen_logps, rejected_logps

    def precompute_reference(self) -> None:
        """Know the reference log-probabilities of every pair, computed once, shared between the
        processes.

        The reference never changes, so each step saves a forward pass, and each later run all of
        them: what is computed goes to ``reference_cache``. All processes make the same number of
        forward passes, as ZeRO stage 3 needs.
        """
        self.model.eval()
        self.known_reference = {}
        pairs = self._pairs_by_key()
        known = self._read_reference(pairs)
        missing = [key for key in pairs if key not in known]
        size = self.args.per_device_eval_batch_size
        found: dict[str, list[float]] = {}
        for start in range(0, len(missing), self.args.world_size * size):
            first = start + self.args.process_index * size
            # A process whose share is empty computes the first pair again, to keep step.
            batch = missing[first : first + size] or missing[:1]
            logps = self._compute_reference([pairs[key] for key in batch])
            found.update(zip(batch, logps, strict=True))
        known |= dict(gather_object(list(found.items())))
        if missing and self.reference_cache and self.is_world_process_zero():
            write_sealed(self.reference_cache, known)
        self.known_reference = known

    def _pairs_by_key(self) -> dict[str, dict[str, Any]]:
        """Every different pair of training and validation, the shortest first, so that a batch
        holds pairs of like length.
        """
        found = []
        for data in (self.train_dataset, self.eval_dataset):
            if data is not None:
                for pair, length in zip(data, self.row_lengths(data), strict=True):
                    found.append((length, pair_key(pair, self.args.max_length), pair))
        found.sort(key=lambda item: item[:2])
        return {key: pair for _, key, pair in found}

    def _read_reference(self, pairs: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
        """The cache's values, or none where they are not what was written, or not what the model
        says of up to four of ``pairs``.

        Four are enough: the file belongs to one model by its name, and what can differ (precision,
        kernels, a changed library) shows in every pair.
        """
        stored: dict[str, list[float]] = {}
        if self.reference_cache and self.is_world_process_zero():
            stored = read_sealed(self.reference_cache) or {}
        known = broadcast_object_list([stored])[0]
        probe = [key for key in pairs if key in known][:4]
        if not probe:
            return known
        again = torch.tensor(self._compute_reference([pairs[key] for key in probe]))
        before = torch.tensor([known[key] for key in probe])
        precision = torch.finfo(torch.bfloat16 if self.args.bf16 else self.model.dtype).eps
        near = torch.allclose(again, before, 10 * precision, max(1e-3, 64 * precision))
        holds = broadcast_object_list([near])[0]
        return known if holds else {}

    def _compute_reference(self, pairs: list[dict[str, Any]]) -> list[list[float]]:
        """Reference log-probabilities [chosen, rejected] of a batch of pairs, by the model."""
        batch = self._prepare_inputs(self.data_collator(pairs))
        # The pairs are of like length, and a process may have fewer than the others: one pass.
        batch.row_lengths = None
        with self.accelerator.autocast():
            logps = super().reference_logps(batch)
        return torch.stack(logps, dim=1).tolist()

"""Relevance-weighted DPO with an image of its own for every answer (arXiv 2412.06141, method step
3).

This is the plain trainer, on top of TRL's: two rows a pair, one forward pass, in reading order.
`scale.fast_trainer` computes the same losses and gradients in about half the time, and profiles use
it where they ask for one of its savings (``training.shared_prefix``, ``training.cache_reference``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput
from trl import DPOTrainer
from trl.data_utils import apply_chat_template
from trl.models.utils import disable_gradient_checkpointing

from .base.epoch_order import EpochOrder
from .base.errors import InputError
from .base.images import open_image, resolve_image
from .base.rows import Row, question_text
from .lvlm import image_token_count
from .preference_rows import answer_text, row_source

PROJECTOR = "multi_modal_projector"
CACHED_IMAGES = 2048  # decoded images that a collator keeps: each comes once an epoch


def preference_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float,
    weights: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Relevance-weighted DPO loss, one value per pair; its mean is the training loss.

    ``weight * -log sigmoid(beta * ((policy_chosen - reference_chosen)
    - (policy_rejected - reference_rejected)))``

    Args:
        policy_chosen_logps: log-probability (sum over answer tokens) of y_w given image x under the
            policy. Shape: [B].
        policy_rejected_logps: the same for y_l given the rejected image x*. Shape: [B].
        reference_chosen_logps: log-probability of y_w given x under the model before training.
            Shape: [B].
        reference_rejected_logps: the same for y_l given x*. Shape: [B].
        beta: strength of the tie to the reference, above 0 (0.1 in the released recipe).
        weights: normalised clinical relevance s' of each pair, 0 or more. Shape: [B], or one
            number.

    Returns:
        Losses, 0 or more; ``weight * ln 2`` where the policy equals the reference. Shape: [B].
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps
    margins = chosen_log_ratio - rejected_log_ratio
    return -weights * F.logsigmoid(beta * margins)  # arXiv 2412.06141, the weighted objective


def adapter_config(
    rank: int, alpha: int, dropout: float, trains: Sequence[str] = ("lora", "projector")
) -> LoraConfig:
    """What is trained: LoRA on every linear layer of the language model except lm_head, the
    projector beside it, or one of the two alone.
    """
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if "lora" in trains else DUMMY_TARGET_MODULES,
        modules_to_save=[PROJECTOR] if "projector" in trains else None,
        exclude_modules=rf".*(vision_tower|{PROJECTOR}).*",
    )


def preference_dataset(
    rows: Sequence[Row],
    weights: Sequence[float],
    processor: ProcessorMixin,
    image_root: Path,
    rejected_root: Path,
    max_length: int,
) -> Dataset:
    """Tokenised preference pairs; images stay on disk, as paths.

    Args:
        rows: manifest rows. Length: N.
        weights: normalised relevance s' of each row. Length: N.
        processor: the LLaVA processor; its chat template writes prompt and answer.
        image_root: folder of ``image``.
        rejected_root: folder of ``rejected_image``; a row without one is rejected on its own
            ``image``.
        max_length: tokens of prompt (image tokens included) and one answer that the model is given
            at most.

    Returns:
        ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``image``, ``rejected_image``, ``weight``
        and ``visual`` (whether the two images differ) of each pair.

    Raises:
        InputError: an image is missing, or of an answer nothing is left within ``max_length``.
    """
    image_tokens = processor.image_token * image_token_count(processor)
    pairs = []
    for row, weight in zip(rows, weights, strict=True):
        texts = _texts(row, processor)
        texts["prompt"] = texts["prompt"].replace(processor.image_token, image_tokens)
        pair: dict[str, Any] = {}
        for part in ("prompt", "chosen", "rejected"):
            encoded = processor.tokenizer(texts[part], add_special_tokens=False)
            pair[f"{part}_ids"] = encoded["input_ids"]
        if len(pair["prompt_ids"]) >= max_length:
            raise InputError(
                f"pair {row['id']}: its prompt has {len(pair['prompt_ids'])} tokens, image "
                "included, and leaves no room for an answer; raise the profile's "
                f"`training.max_length` ({max_length})"
            )
        image = resolve_image(image_root, row["image"])
        rejected_image = image
        if row.get("rejected_image"):
            rejected_image = resolve_image(rejected_root, row["rejected_image"])
        pair["image"] = str(image)
        pair["rejected_image"] = str(rejected_image)
        pair["weight"] = float(weight)
        pair["visual"] = row_source(row) == "visual"
        pairs.append(pair)
    return Dataset.from_list(pairs)


def _texts(row: Row, processor: ProcessorMixin) -> dict[str, str]:
    """Prompt, chosen and rejected answer of a row as the chat template writes them."""
    question = [{"type": "image"}, {"type": "text", "text": question_text(row)}]
    messages: dict[str, Any] = {"prompt": [{"role": "user", "content": question}]}
    for side in ("chosen", "rejected"):
        answer = answer_text(row, rejected=side == "rejected")
        content = [{"type": "text", "text": answer}]
        messages[side] = [{"role": "assistant", "content": content}]
    return apply_chat_template(messages, processor)


@dataclass
class PreferenceBatch(ModelOutput):
    """B pairs as 2B rows: the chosen rows first, then the rejected ones in the same order.

    A `ModelOutput`, so that transformers and accelerate move it as they move a dictionary.
    """

    input_ids: torch.Tensor | None = None  # [2B, T] prompt, answer, padding
    attention_mask: torch.Tensor | None = None  # [2B, T] 1 where there is a token
    answer_mask: torch.Tensor | None = None  # [2B, T] True at the answer's tokens
    pixel_values: torch.Tensor | None = None  # [2B, 3, H, W] each row's own image
    weights: torch.Tensor | None = None  # [B] normalised relevance s'
    visual: torch.Tensor | None = None  # [B] 1 for a visual pair, 0 for a text pair
    chosen_lengths: torch.Tensor | None = None  # [B] tokens of the chosen answer
    tokens: torch.Tensor | None = None  # [B] tokens that the model reads of the pair


@dataclass
class PreferenceCollator:
    """Batches of pairs, from rows of `preference_dataset`.

    Two pairs whose prompts have the tokens 1 2 3 and 1 4::

        {prompt_ids: [1, 2, 3], chosen_ids: [7], rejected_ids: [8, 9], ...}
        {prompt_ids: [1, 4],    chosen_ids: [7], rejected_ids: [5],    ...}

    become four rows, padded on the right with 0::

        input_ids              answer_mask
        1 2 3 7 0              . . . x .     pair 0, chosen
        1 4 7 0 0              . . x . .     pair 1, chosen
        1 2 3 8 9              . . . x x     pair 0, rejected
        1 4 5 0 0              . . x . .     pair 1, rejected

    A row is cut where prompt and answer reach ``max_length``.
    """

    pad_token_id: int
    max_length: int
    processor: ProcessorMixin

    def __post_init__(self) -> None:
        self.pixels = lru_cache(maxsize=CACHED_IMAGES)(self.read_pixels)

    def read_pixels(self, path: str) -> torch.Tensor:
        """The image at ``path`` as the vision tower takes it. Shape: [3, H, W]."""
        image = open_image(path).convert("RGB")
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> PreferenceBatch:
        """Collate B pairs."""
        rows = []
        answer_masks = []
        images = []
        answer_lengths = []
        for side, image in (("chosen_ids", "image"), ("rejected_ids", "rejected_image")):
            for pair in pairs:
                prompt = pair["prompt_ids"]
                answer = pair[side][: self.max_length - len(prompt)]
                rows.append(torch.tensor(prompt + answer))
                answer_masks.append(torch.tensor([False] * len(prompt) + [True] * len(answer)))
                images.append(self.pixels(pair[image]))
                answer_lengths.append(len(answer))
        row_lengths = torch.tensor([len(row) for row in rows])
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        chosen_tokens, rejected_tokens = row_lengths.chunk(2)
        return PreferenceBatch(
            input_ids=input_ids,
            attention_mask=(torch.arange(input_ids.shape[1]) < row_lengths[:, None]).long(),
            answer_mask=pad_sequence(answer_masks, batch_first=True),
            pixel_values=torch.stack(images),
            weights=torch.tensor([pair["weight"] for pair in pairs]),
            visual=torch.tensor([float(pair["visual"]) for pair in pairs]),
            chosen_lengths=torch.tensor(answer_lengths[: len(pairs)]),
            tokens=chosen_tokens + rejected_tokens,
        )


class MMedPOTrainer(DPOTrainer):
    """TRL's DPO trainer with a weight per pair, rejected images, and a learning rate for the
    projector.

    ``loss_type="sft"`` trains on the chosen answers alone and ignores the weights. Rows come from
    `preference_dataset`, batches from `PreferenceCollator`.

    Args:
        model: the Med-LVLM before training; ``peft_config`` (`adapter_config`) says what is
            trained.
        projector_learning_rate: of the projector; ``args.learning_rate`` is LoRA's.
        reference: "initial": the model before training (adapter off, the projector as it was);
            "released": adapter off, but the projector as trained so far, as the released code does,
            so that the reference drifts.
        arguments: TRL's own.

    Raises:
        InputError: FlexAttention is asked for on a CPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        projector_learning_rate: float,
        reference: str = "initial",
        **arguments: Any,
    ) -> None:
        self.projector_learning_rate = projector_learning_rate
        self.reference = reference
        self.train_tokens = 0
        self.optimizer: torch.optim.Optimizer | None = None
        super().__init__(model, **arguments)
        self.language_model = self.model.get_base_model().model.language_model
        attention = self.language_model.config._attn_implementation
        if attention == "flex_attention" and self.args.device.type == "cpu":
            raise InputError(
                "training.attention: flex_attention needs a GPU to train; set training.attention "
                "to sdpa"
            )

    def compute_logps(
        self, model: torch.nn.Module, batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (sums over answer tokens) of chosen and rejected answers, in one
        forward pass. Shape: [B] each.
        """
        outputs = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.pixel_values,
            use_cache=False,
        )
        # One to the left: the logits at position t predict the token at t + 1.
        logits = outputs.logits[:, :-1].float()
        next_tokens = batch.input_ids[:, 1:]
        is_answer = batch.answer_mask[:, 1:]
        token_logps = logits.log_softmax(-1).gather(-1, next_tokens[..., None])[..., 0]
        row_logps = (token_logps * is_answer).sum(-1)  # [2B]
        chosen_logps, rejected_logps = row_logps.chunk(2)
        return chosen_logps, rejected_logps

    @contextmanager
    def reference_model(self) -> Iterator[None]:
        """Inside, the model is the reference and nothing has a gradient."""
        checkpointing = disable_gradient_checkpointing(
            self.model, self.args.gradient_checkpointing_kwargs
        )
        with torch.no_grad(), checkpointing, self.model.disable_adapter():
            if self.reference == "released":
                for module in self.model.modules():
                    if isinstance(module, AuxiliaryTrainingWrapper):  # the projector's copy
                        module.enable_adapters(True)
            yield

    def reference_logps(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of chosen and rejected answers under the reference. Shape: [B] each."""
        with self.reference_model():
            return self.compute_logps(self.model, batch)

    def _compute_loss(self, model: torch.nn.Module, inputs: Any, return_outputs: bool) -> Any:
        # The reference first: what the policy keeps for its backward pass is not there yet.
        reference_chosen_logps, reference_rejected_logps = self.reference_logps(inputs)
        policy_chosen_logps, policy_rejected_logps = self.compute_logps(model, inputs)
        losses = preference_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            self.beta,
            inputs.weights,
        )
        if self.loss_types == ["sft"]:
            loss = -policy_chosen_logps.sum() / inputs.chosen_lengths.sum()
        else:
            loss = losses.mean()
        self._record(
            {
                "loss": losses,
                "chosen_logp": policy_chosen_logps,
                "rejected_logp": policy_rejected_logps,
                "reference_chosen_logp": reference_chosen_logps,
                "reference_rejected_logp": reference_rejected_logps,
                "weight": inputs.weights,
                "visual": inputs.visual,
                "tokens": inputs.tokens,
            }
        )
        if not return_outputs:
            return loss
        return loss, {"logps": torch.stack([policy_chosen_logps, policy_rejected_logps])}

    def _record(self, pairs: dict[str, torch.Tensor]) -> None:
        """Keep every pair's values, of all processes, for the next log. Shape of each: [B]."""
        training = self.model.training
        names = list(pairs)
        table = torch.stack([pairs[name].detach().float() for name in names], dim=1)
        if training:
            # A step's batches are fetched ahead, so that none of them knows that it is the last.
            table = self.accelerator.gather(table)
        else:
            table = self.accelerator.gather_for_metrics(table)
        values = dict(zip(names, table.unbind(1), strict=True))
        self._log_pairs(values, "train" if training else "eval")

    def _log_pairs(self, pairs: dict[str, torch.Tensor], mode: str) -> None:
        """Add pairs to what the next log averages, over all and over each source.

        A reward is ``beta * (policy - reference)``, in nats times beta; a pair is ranked right
        where the chosen answer's is the greater, and by half where the two are equal, as before the
        first step.
        """
        chosen_reward = self.beta * (pairs["chosen_logp"] - pairs["reference_chosen_logp"])
        rejected_reward = self.beta * (pairs["rejected_logp"] - pairs["reference_rejected_logp"])
        values = {
            "chosen_logp": pairs["chosen_logp"],
            "rejected_logp": pairs["rejected_logp"],
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
            "margin": chosen_reward - rejected_reward,
            "accuracy": (1 + torch.sign(chosen_reward - rejected_reward)) / 2,
        }
        metrics = self._metrics[mode]
        metrics["weight"] += pairs["weight"].tolist()
        for name, value in values.items():
            metrics[name] += value.tolist()
        for number, source in enumerate(("text", "visual")):
            of_source = pairs["visual"] == number
            if of_source.any():
                metrics[f"{source}_loss"] += pairs["loss"][of_source].tolist()
                for name, value in values.items():
                    metrics[f"{source}_{name}"] += value[of_source].tolist()
        # Tokens are a sum, and what is kept here is averaged: so one number, the sum so far.
        read = int(pairs["tokens"].sum())
        if mode == "train":
            self.train_tokens += read
            metrics["tokens"] = [self.train_tokens]
        else:
            metrics["tokens"] = [sum(metrics["tokens"], read)]

    def row_lengths(self, data: Dataset) -> list[int]:
        """Tokens of each pair's longest row, by which pairs of like length come together."""
        lengths = []
        for pair in data:
            answer = max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
            lengths.append(min(len(pair["prompt_ids"]) + answer, self.args.max_length))
        return lengths

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler:
        data = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy == "sequential":
            return torch.utils.data.SequentialSampler(data)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        group = step * self.args.world_size if strategy == "group_by_length" else None
        return EpochOrder(
            self.row_lengths(data), group, self.args.seed, lambda: int(self.state.epoch or 0)
        )

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler | None:
        return torch.utils.data.SequentialSampler(eval_dataset)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of ``args.optim`` with two groups: LoRA at ``learning_rate``, the projector
        at its own rate.
        """
        if self.optimizer is None:
            lora: list[torch.nn.Parameter] = []
            projector: list[torch.nn.Parameter] = []
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    (projector if PROJECTOR in name else lora).append(parameter)
            groups = []
            if lora:
                groups.append({"params": lora, "lr": self.args.learning_rate})
            if projector:
                groups.append({"params": projector, "lr": self.projector_learning_rate})
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options, weight_decay=self.args.weight_decay)
        return self.optimizer

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The batch on the device; a weight stays in 32 bits where DeepSpeed makes the rest
        bfloat16.
        """
        exact = {"weights": inputs["weights"], "visual": inputs["visual"]}
        prepared = super()._prepare_inputs(inputs)
        for name, value in exact.items():
            prepared[name] = value.to(self.args.device)
        return prepared

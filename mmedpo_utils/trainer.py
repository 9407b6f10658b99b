"""Weighted DPO with a rejected image of its own for every pair, on top of TRL's trainer (arXiv 2412.06141, method step 3)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput
from trl import DPOTrainer
from trl.data_utils import apply_chat_template
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .errors import InputError
from .files import write_json
from .manifests import answer_text, open_image, question_text, resolve_image, row_source

PROJECTOR = "multi_modal_projector"
CACHED_IMAGES = 2048


def preference_loss(policy_chosen_logps: torch.Tensor, policy_rejected_logps: torch.Tensor,
                    reference_chosen_logps: torch.Tensor, reference_rejected_logps: torch.Tensor,
                    beta: float, weights: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Relevance-weighted DPO loss, one value per pair; its mean is the training loss (arXiv 2412.06141, method step 3).

    ``weight * -log sigmoid(beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)))``

    Args:
        policy_chosen_logps: log-probability (sum over answer tokens) of y_w given image x under the policy. Shape: [B].
        policy_rejected_logps: the same for y_l given the rejected image x*. Shape: [B].
        reference_chosen_logps: log-probability of y_w given x under the model before training. Shape: [B].
        reference_rejected_logps: the same for y_l given x*. Shape: [B].
        beta: strength of the tie to the reference, above 0 (0.1 in the released recipe).
        weights: normalised clinical relevance s' of each pair, 0 or more. Shape: [B], or one number.

    Returns:
        Losses, 0 or more; ``weight * ln 2`` where the policy equals the reference. Shape: [B].
    """
    margins = (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)
    return -weights * F.logsigmoid(beta * margins)


def image_token_count(processor: ProcessorMixin) -> int:
    """How many image tokens one ``<image>`` mark becomes."""
    batch = processor(images=Image.new("RGB", (64, 64)), text=processor.image_token, return_tensors="pt")
    return int((batch["input_ids"] == processor.image_token_id).sum())


def preference_dataset(rows: Sequence[dict[str, Any]], weights: Sequence[float], processor: ProcessorMixin,
                       image_root: Path, rejected_root: Path, max_length: int) -> Dataset:
    """Tokenised preference pairs; images stay on disk, as paths.

    Args:
        rows: manifest rows. Length: N.
        weights: normalised relevance s' of each row. Length: N.
        processor: the LLaVA processor; its chat template writes prompt and answer.
        image_root: folder of ``image``.
        rejected_root: folder of ``rejected_image``; a row without one is rejected on its own ``image``.
        max_length: tokens of prompt (image tokens included) and answer that the model is given at most.

    Raises:
        InputError: an image is missing, or a prompt leaves no room for an answer within ``max_length``.
    """
    patches, pairs = processor.image_token * image_token_count(processor), []
    for row, weight in zip(rows, weights, strict=True):
        turn = [{"type": "image"}, {"type": "text", "text": question_text(row)}]
        answers = {key: [{"role": "assistant", "content": [{"type": "text", "text": answer_text(row, key == "rejected")}]}]
                   for key in ("chosen", "rejected")}
        texts = apply_chat_template({"prompt": [{"role": "user", "content": turn}], **answers}, processor)
        texts["prompt"] = texts["prompt"].replace(processor.image_token, patches)
        pair: dict[str, Any] = {f"{key}_ids": processor.tokenizer(texts[key], add_special_tokens=False)["input_ids"]
                                for key in ("prompt", "chosen", "rejected")}
        if len(pair["prompt_ids"]) >= max_length:
            raise InputError(f"pair {row['id']}: its prompt has {len(pair['prompt_ids'])} tokens, image included, and leaves no "
                             f"room for an answer; raise the profile's `training.max_length` ({max_length})")
        image, rejected = resolve_image(image_root, row["image"]), row.get("rejected_image")
        pairs.append({**pair, "image": str(image), "weight": float(weight), "visual": row_source(row) == "visual",
                      "rejected_image": str(resolve_image(rejected_root, rejected) if rejected else image)})
    return Dataset.from_list(pairs)


def pair_keys(pairs: Dataset, max_length: int) -> list[str]:
    """What decides the reference log-probabilities of each pair besides the model: tokens and images, as SHA-256."""
    digest = lru_cache(maxsize=None)(lambda path: hashlib.sha256(Path(path).read_bytes()).hexdigest())
    return [hashlib.sha256(json.dumps([max_length, *(pair[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")),
                                       digest(pair["image"]), digest(pair["rejected_image"])]).encode()).hexdigest()
            for pair in pairs]


@dataclass
class PreferenceCollator(DataCollatorForPreference):
    """TRL's preference collator, plus images and weights: the first half of the batch is chosen, the second rejected.

    Adds to ``input_ids``, ``attention_mask`` and ``completion_mask`` [2B, T]: ``pixel_values`` [2B, 3, H, W] (the second
    half holds the rejected images), ``weights`` [B] and ``visual`` [B] (1 for a visual pair).
    """

    processor: ProcessorMixin | None = None

    def __post_init__(self) -> None:
        self.pixels = lru_cache(maxsize=CACHED_IMAGES)(self.read_pixels)

    def read_pixels(self, path: str) -> torch.Tensor:
        """The image at ``path`` as the vision tower takes it. Shape: [3, H, W]."""
        image = open_image(path).convert("RGB")
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate B rows of `preference_dataset`."""
        batch = super().torch_call(examples)
        paths = [example[key] for key in ("image", "rejected_image") for example in examples]
        batch["pixel_values"] = torch.stack([self.pixels(path) for path in paths])
        batch["weights"] = torch.tensor([example["weight"] for example in examples])
        batch["visual"] = torch.tensor([float(example["visual"]) for example in examples])
        return batch


def share_images(vision_tower: torch.nn.Module) -> None:
    """Make a frozen tower encode an image once where the rejected half of a batch [2B, 3, H, W] repeats the chosen half."""
    rows: list[torch.Tensor] = []

    def before(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        chosen, rejected = arguments[0].chunk(2)
        own = (chosen != rejected).flatten(1).any(1)
        first = torch.arange(len(chosen), device=own.device)
        rows.append(torch.cat([first, torch.where(own, len(chosen) - 1 + own.cumsum(0), first)]))
        return (torch.cat([chosen, rejected[own]]),)

    def after(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: ModelOutput) -> None:
        place = rows.pop()
        output.hidden_states = tuple(None if states is None else states[place] for states in output.hidden_states)

    vision_tower.register_forward_pre_hook(before)
    vision_tower.register_forward_hook(after)


class MMedPOTrainer(DPOTrainer):
    """TRL's DPO trainer with a weight per pair, rejected images, and a learning rate for the projector.

    The reference is the model before training: with the adapter off, PEFT restores both the language model (LoRA) and
    the projector (``modules_to_save``). ``loss_type="sft"`` trains on the chosen half alone and ignores the weights.
    Rows come from `preference_dataset`, batches from `PreferenceCollator`. ``reference_cache`` is a JSON file of reference
    log-probabilities that `precompute_reference` reads and extends; one file belongs to one model.
    """

    def __init__(self, model: PreTrainedModel, *, projector_learning_rate: float, reference_cache: Path | None = None,
                 **arguments: Any) -> None:
        self.projector_learning_rate, self.reference_cache = projector_learning_rate, reference_cache
        super().__init__(model, **arguments)
        if getattr(model, "is_loaded_in_4bit", False):
            for parameter in self.model.parameters():  # TRL makes them bfloat16, where steps of 1e-7 round to nothing
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        share_images(self.model.get_base_model().model.vision_tower)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with two groups: the LoRA weights at ``learning_rate``, the projector at its own rate."""
        if self.optimizer is None:
            groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups[PROJECTOR in name].append(parameter)
            rates = {False: self.args.learning_rate, True: self.projector_learning_rate}
            self.optimizer = torch.optim.AdamW(
                [{"params": group, "lr": rates[key]} for key, group in groups.items() if group],
                betas=(self.args.adam_beta1, self.args.adam_beta2), eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay)
        return self.optimizer

    def precompute_reference(self) -> None:
        """Give every pair the columns ``ref_chosen_logps`` and ``ref_rejected_logps``, once, shared between the processes.

        The reference never changes, so each later epoch saves a forward pass, and each later run all of them: what is
        computed goes to ``reference_cache``. What is read from there is checked on a few pairs first; where it does not
        hold, everything is computed anew. Not for ZeRO stage 3, where no process holds the whole model.
        """
        self.model.to(self.args.device).eval()
        datasets = {name: data for name in ("train_dataset", "eval_dataset") if (data := getattr(self, name)) is not None}
        pairs = {key: pair for data in datasets.values() for key, pair in zip(pair_keys(data, self.args.max_length), data)}
        known = self._read_reference(pairs)
        missing, found = [key for key in pairs if key not in known], {}
        size, rank, world = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        for start in range(rank * size, len(missing), world * size):
            batch = missing[start : start + size]
            found |= zip(batch, self._reference_logps([pairs[key] for key in batch]), strict=True)
        known |= dict(gather_object(list(found.items())))
        if missing and self.reference_cache and self.is_world_process_zero():
            write_json(self.reference_cache, known)
        for name, data in datasets.items():
            columns = zip(*(known[key] for key in pair_keys(data, self.args.max_length)), strict=True)
            for column, values in zip(("ref_chosen_logps", "ref_rejected_logps"), columns, strict=True):
                data = data.add_column(column, list(values))
            setattr(self, name, data)

    def _read_reference(self, pairs: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
        """The cache's values, or none where they are not what the model says of up to four of ``pairs``."""
        if not (self.reference_cache and self.reference_cache.is_file()):
            return {}
        known = json.loads(self.reference_cache.read_text(encoding="utf-8"))
        probe = [key for key in pairs if key in known][:4]
        if not probe:
            return known
        again = torch.tensor(self._reference_logps([pairs[key] for key in probe]))
        return known if torch.allclose(again, torch.tensor([known[key] for key in probe]), atol=1e-3) else {}

    def _reference_logps(self, pairs: list[dict[str, Any]]) -> list[list[float]]:
        """Reference log-probabilities [chosen, rejected] of a batch of pairs."""
        batch = self._prepare_inputs(self.data_collator(pairs))
        logps = self.compute_ref_log_probs(self.model, {key: batch[key] for key in batch if key not in EXTRA})
        return torch.stack(logps, dim=1).tolist()

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        weights, visual = inputs["weights"], inputs["visual"].bool()
        inputs = {key: value for key, value in inputs.items() if key not in EXTRA}
        reference = inputs.pop("ref_chosen_logps", None), inputs.pop("ref_rejected_logps", None)
        if reference[0] is None:
            reference = self.compute_ref_log_probs(self.model, inputs)
        answer = inputs.pop("completion_mask")
        labels = inputs["input_ids"].masked_fill(answer == 0, -100)
        outputs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
        if self.loss_types == ["sft"]:
            loss = -chosen.sum() / answer[: len(chosen)].sum()
        else:
            loss = preference_loss(chosen, rejected, *reference, self.beta, weights).mean()
        self._record(torch.stack([chosen, rejected, *reference, weights, visual.float()], dim=1).detach())
        return (loss, outputs) if return_outputs else loss

    def _record(self, pairs: torch.Tensor) -> None:
        """Keep the batch's means for the next log. ``pairs`` holds the columns of `_compute_loss`. Shape: [B, 6]."""
        pairs = self.accelerator.gather_for_metrics(pairs)
        chosen, rejected, reference_chosen, reference_rejected, weights, visual = pairs.unbind(1)
        rewards = self.beta * (chosen - reference_chosen), self.beta * (rejected - reference_rejected)
        right = (rewards[0] > rewards[1]).float()
        values = {"chosen_logp": chosen, "rejected_logp": rejected, "chosen_reward": rewards[0], "rejected_reward": rewards[1],
                  "margin": rewards[0] - rewards[1], "accuracy": right, "weight": weights,
                  "text_accuracy": right[visual == 0], "visual_accuracy": right[visual == 1]}
        for key, value in values.items():
            if len(value):
                self._metrics["train" if self.model.training else "eval"][key].append(value.mean().item())


EXTRA = ("weights", "visual")

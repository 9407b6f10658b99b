"""Weighted DPO with a rejected image of its own for every pair, on top of TRL's trainer (arXiv 2412.06141, method step 3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import LoraConfig
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from . import prefix
from .errors import InputError
from .files import write_json
from .preferences import PreferenceCollator, image_token_count, pair_keys, preference_dataset

__all__ = ["PROJECTOR", "MMedPOTrainer", "PreferenceCollator", "adapter_config", "image_token_count", "pair_keys",
           "preference_dataset", "preference_loss"]
PROJECTOR = "multi_modal_projector"
LENGTH = "length"


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


def adapter_config(rank: int, alpha: int, dropout: float, trains: Sequence[str] = ("lora", "projector")) -> LoraConfig:
    """LoRA on every linear layer of the language model except lm_head, the projector beside it, or one of the two alone."""
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout,
                      target_modules="all-linear" if "lora" in trains else DUMMY_TARGET_MODULES,
                      modules_to_save=[PROJECTOR] if "projector" in trains else None,
                      exclude_modules=rf".*(vision_tower|{PROJECTOR}).*")


class FrozenTower:
    """A frozen vision tower that remembers what it last said, until `clear`: policy and reference read one batch."""

    def __init__(self, tower: torch.nn.Module) -> None:
        self.encode, self.pixels, self.states = tower.forward, None, None
        tower.forward = self.forward

    def forward(self, pixel_values: torch.Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """The tower's hidden states, without gradient; from memory for the images of the call before. [I, 3, H, W]."""
        if self.pixels is None or not torch.equal(self.pixels, pixel_values):
            with torch.no_grad():
                self.states = self.encode(pixel_values, **options).hidden_states
            self.pixels = pixel_values
        return BaseModelOutputWithPooling(hidden_states=self.states)

    def clear(self) -> None:
        """Forget."""
        self.pixels = self.states = None


def spread_images(model: torch.nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Hook before the LLaVA model: encode each different image once, give every row its own by ``image_rows`` [R]."""
    rows = options.pop("image_rows", None)
    if rows is not None:
        images = model.get_image_features(options.pop("pixel_values"), return_dict=True)
        images.pooler_output = list(torch.stack(images.pooler_output)[rows])
        options["mm_encoder_outputs"] = {"image": images}
    return arguments, options


def keep_answers(_: torch.nn.Module, __: tuple, options: dict[str, Any], output: Any) -> Any:
    """Hook after the language model: keep the positions that predict answer tokens, [1, N] of [R, T]; lm_head sees no other."""
    if "answer_rows" in options:
        output.last_hidden_state = output.last_hidden_state[options["answer_rows"], options["answer_positions"]][None]
    return output


class EpochOrder(torch.utils.data.Sampler):
    """The order of the pairs in each epoch: seed and epoch alone decide, so that every process and a resumed run agree.

    Args:
        lengths: tokens of each pair. Length: N.
        group: pairs of one step; with it, pairs of like length come together. None: any order.
        epoch: tells the epoch that begins; the libraries' own samplers forget it where several processes resume.
    """

    def __init__(self, lengths: Sequence[int], group: int | None, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.group, self.seed, self.epoch = lengths, group, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.group:
            return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))
        return iter(torch.randperm(len(self.lengths), generator=generator).tolist())


class ReferenceCallback(TrainerCallback):
    """Computes the reference when training begins: the model is where it trains then, also inside DeepSpeed's engine."""

    def __init__(self, trainer: MMedPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Compute, or read, what `MMedPOTrainer.precompute_reference` gives."""
        self.trainer.precompute_reference()


class MMedPOTrainer(DPOTrainer):
    """TRL's DPO trainer with a weight per pair, rejected images, and a learning rate for the projector.

    ``loss_type="sft"`` trains on the chosen answers alone and ignores the weights. Rows come from `preference_dataset`,
    batches from `PreferenceCollator`, whose ``shared_prefix`` halves the work of a pair with one image.

    Args:
        model: the Med-LVLM before training; ``peft_config`` (`adapter_config`) says what is trained.
        projector_learning_rate: of the projector; ``args.learning_rate`` is LoRA's.
        reuse_vision_features: read each image of a batch once with a frozen tower, for policy and reference together.
        reference: "initial": the model before training (adapter off, the projector as it was); "released": adapter off,
            but the projector as trained so far, as the released code does, so that the reference drifts.
        cache_reference: compute the initial reference once, when training begins, instead of in every step.
        reference_cache: JSON file that keeps the reference between runs; one file belongs to one model.
        arguments: TRL's own.

    Raises:
        InputError: rows share their prompt, and the model's attention reaches less than ``max_length`` tokens back; or
            FlexAttention is asked for on a CPU.
    """

    def __init__(self, model: PreTrainedModel, *, projector_learning_rate: float, reuse_vision_features: bool = True,
                 reference: str = "initial", cache_reference: bool = True, reference_cache: Path | None = None,
                 **arguments: Any) -> None:
        self.projector_learning_rate, self.reference = projector_learning_rate, reference
        self.reference_cache, self.known_reference = reference_cache, {}
        self.reuse_vision_features = reuse_vision_features
        super().__init__(model, **arguments)
        if not self.is_deepspeed_enabled:  # which keeps a 32-bit copy itself
            for parameter in self.model.parameters():  # in bfloat16 a step of 1e-7 rounds to nothing
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        llava = self.model.get_base_model().model
        frozen = not any(parameter.requires_grad for parameter in llava.vision_tower.parameters())
        self.tower = FrozenTower(llava.vision_tower) if reuse_vision_features and frozen else None
        llava.register_forward_pre_hook(spread_images, with_kwargs=True)
        llava.language_model.register_forward_hook(keep_answers, with_kwargs=True)
        self._prepare_attention(llava.language_model)
        self.train_tokens = 0
        if cache_reference and reference == "initial":
            self._add_column("key", lambda data: pair_keys(data, self.args.max_length))
            self.add_callback(ReferenceCallback(self))
        self._add_column(LENGTH, lambda data: [max(len(row) for row, _ in self.data_collator.rows(pair)) for pair in data])

    def _add_column(self, name: str, values: Any) -> None:
        for attribute in ("train_dataset", "eval_dataset"):
            data = getattr(self, attribute)
            if data is not None:
                setattr(self, attribute, data.add_column(name, values(data)))

    def _prepare_attention(self, language_model: PreTrainedModel) -> None:
        """Choose the attention that fits shared rows."""
        config = language_model.config
        window = getattr(config, "sliding_window", None)
        if self.data_collator.shared_prefix and window and window < self.args.max_length:
            raise InputError(f"training.shared_prefix: the model's attention window is {window} tokens, fewer than "
                             f"`training.max_length` ({self.args.max_length}); set training.shared_prefix to false")
        if config._attn_implementation == "flex_attention" and self.args.device.type == "cpu":
            raise InputError("training.attention: flex_attention needs a GPU to train; set training.attention to sdpa")
        if config._attn_implementation == "sdpa":
            language_model.set_attn_implementation(prefix.PREFIX_ATTENTION)
        self.attention = config._attn_implementation

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler:
        data, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        if args.train_sampling_strategy == "sequential":
            return torch.utils.data.SequentialSampler(data)
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return EpochOrder(data[LENGTH], step if args.train_sampling_strategy == "group_by_length" else None, args.seed,
                          lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler | None:
        return torch.utils.data.SequentialSampler(eval_dataset)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of ``args.optim`` with two groups: LoRA at ``learning_rate``, the projector at its own rate."""
        if self.optimizer is None:
            groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups[PROJECTOR in name].append(parameter)
            rates = {False: self.args.learning_rate, True: self.projector_learning_rate}
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind([{"params": group, "lr": rates[key]} for key, group in groups.items() if group],
                                  **options, weight_decay=self.args.weight_decay)
        return self.optimizer

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device; a weight stays in 32 bits where DeepSpeed makes the rest bfloat16."""
        exact = {key: inputs[key].to(self.args.device) for key in ("weights", "visual")}
        return super()._prepare_inputs(inputs) | exact

    def precompute_reference(self) -> None:
        """Know the reference log-probabilities of every pair, computed once, shared between the processes.

        The reference never changes, so each step saves a forward pass, and each later run all of them: what is
        computed goes to ``reference_cache``. What is read from there is checked on a few pairs first; where it does not
        hold, everything is computed anew. All processes make the same number of forward passes, as ZeRO stage 3 needs.
        """
        self.model.eval()
        datasets = [data for data in (self.train_dataset, self.eval_dataset) if data is not None]
        places = [(length, key, data, number) for data in datasets
                  for number, (length, key) in enumerate(zip(data[LENGTH], data["key"]))]
        pairs = {key: (data, number) for _, key, data, number in sorted(places, key=lambda place: place[:2])}
        known = self._read_reference(pairs)
        missing, found = [key for key in pairs if key not in known], {}
        size, rank, world = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        for start in range(0, len(missing), world * size):
            batch = missing[start + rank * size : start + (rank + 1) * size] or missing[:1]
            found |= zip(batch, self._reference_of([pairs[key] for key in batch]), strict=True)
        known |= dict(gather_object(list(found.items())))
        if missing and self.reference_cache and self.is_world_process_zero():
            write_json(self.reference_cache, known)
        self.known_reference = known

    def _read_reference(self, pairs: dict[str, tuple[Dataset, int]]) -> dict[str, list[float]]:
        """The cache's values, or none where they are not what the model says of up to four of ``pairs``."""
        stored = {}
        if self.reference_cache and self.reference_cache.is_file() and self.is_world_process_zero():
            with suppress(ValueError):  # a damaged file is as good as none
                stored = json.loads(self.reference_cache.read_text(encoding="utf-8"))
        known = broadcast_object_list([stored])[0]
        probe = [key for key in pairs if key in known][:4]
        if not probe:
            return known
        again = torch.tensor(self._reference_of([pairs[key] for key in probe]))
        precision = torch.finfo(torch.bfloat16 if self.args.bf16 else self.model.dtype).eps
        near = torch.allclose(again, torch.tensor([known[key] for key in probe]), 10 * precision, max(1e-3, 64 * precision))
        holds = broadcast_object_list([near])
        return known if holds[0] else {}

    def _reference_of(self, pairs: list[tuple[Dataset, int]]) -> list[list[float]]:
        """Reference log-probabilities [chosen, rejected] of a batch of pairs, each named by its data set and number."""
        inputs = self._prepare_inputs(self.data_collator([data[number] for data, number in pairs]))
        with self.accelerator.autocast():
            logps = self.reference_logps(inputs)
        self._forget_images()
        return torch.stack(logps, dim=1).tolist()

    @contextmanager
    def reference_model(self) -> Iterator[None]:
        """Inside, the model is the reference and nothing has a gradient."""
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, self.model.disable_adapter():
            for module in self.model.modules():
                if self.reference == "released" and isinstance(module, AuxiliaryTrainingWrapper):
                    module.enable_adapters(True)
            yield

    def reference_logps(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of chosen and rejected answers under the reference. Shape: [B] each."""
        with self.reference_model():
            return self.policy_logps(self.model, inputs)

    def policy_logps(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (sums over answer tokens) of chosen and rejected answers, in one forward pass. Shape: [B] each."""
        images = ({"pixel_values": inputs["pixel_values"], "image_rows": inputs["image_rows"]} if self.reuse_vision_features
                  else {"pixel_values": inputs["pixel_values"][inputs["image_rows"]]})
        outputs = model(input_ids=inputs["input_ids"], **images, **self._attention_inputs(inputs),
                        answer_rows=inputs["answer_rows"], answer_positions=inputs["answer_positions"],
                        shift_labels=inputs["answer_ids"][None], use_cache=False, fused_lm_head=True)
        sums = outputs.log_probs.new_zeros(2 * len(inputs["weights"]))
        return sums.index_add(0, inputs["answer_owners"], outputs.log_probs[0]).chunk(2)

    def _attention_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Mask and positions; none where no row has two answers: padding is on the right, so that causal attention is enough."""
        branches = inputs["branches"]
        start = prefix.first_branching(branches)
        if start == branches.shape[1]:
            return {}
        if self.attention == "flex_attention":
            mask = prefix.block_mask(branches)
        elif self.attention == prefix.PREFIX_ATTENTION:
            mask = prefix.attention_mask(branches, start)
        else:
            lowest = torch.finfo(self.model.dtype).min
            mask = torch.where(prefix.attention_mask(branches), 0.0, lowest).to(self.model.dtype)
        return {"attention_mask": mask, "position_ids": inputs["position_ids"]}

    def _forget_images(self) -> None:
        if self.tower:
            self.tower.clear()

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        keys = inputs.get("pair_keys")
        if keys and self.known_reference:
            values = torch.tensor([self.known_reference[key] for key in keys], device=inputs["weights"].device)
            reference = values.unbind(1)
        else:
            reference = self.reference_logps(inputs)
        chosen, rejected = self.policy_logps(model, inputs)
        self._forget_images()
        losses = preference_loss(chosen, rejected, *reference, self.beta, inputs["weights"])
        if self.loss_types == ["sft"]:
            loss = -chosen.sum() / (inputs["answer_owners"] < len(chosen)).sum()
        else:
            loss = losses.mean()
        columns = [losses, chosen, rejected, *reference, inputs["weights"], inputs["visual"], inputs["tokens"]]
        self._record(torch.stack(columns, dim=1).detach())
        return (loss, {"logps": torch.stack([chosen, rejected])}) if return_outputs else loss

    def _record(self, pairs: torch.Tensor) -> None:
        """Keep every pair's values for the next log, which averages them. ``pairs``: as `_compute_loss` stacks them. [B, 8]."""
        training = self.model.training  # the batches of a step are fetched ahead, so none of them knows that it is the last
        pairs = self.accelerator.gather(pairs) if training else self.accelerator.gather_for_metrics(pairs)
        losses, chosen, rejected, reference_chosen, reference_rejected, weights, visual, tokens = pairs.unbind(1)
        rewards = self.beta * (chosen - reference_chosen), self.beta * (rejected - reference_rejected)
        values = {"chosen_logp": chosen, "rejected_logp": rejected, "chosen_reward": rewards[0], "rejected_reward": rewards[1],
                  "margin": rewards[0] - rewards[1], "accuracy": (rewards[0] > rewards[1]).float()}
        mode = "train" if training else "eval"
        for key, value in ({"weight": weights} | values).items():
            self._metrics[mode][key] += value.tolist()
        for number, source in enumerate(("text", "visual")):
            for key, value in ({"loss": losses} | values).items():
                if (visual == number).any():
                    self._metrics[mode][f"{source}_{key}"] += value[visual == number].tolist()
        if training:
            self.train_tokens += int(tokens.sum())
        self._metrics[mode]["tokens"] = [self.train_tokens if training else
                                         sum(self._metrics[mode]["tokens"], tokens.sum().item())]

"""The weighted loss against closed forms, and MMedPOTrainer against TRL's own trainer on a tiny
random LLaVA.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.precision import train_in_32_bits
from mmedpo_utils.lvlm import image_token_count
from mmedpo_utils.scale.fast_trainer import FastTrainer, PackingCollator, halves, pair_key
from mmedpo_utils.trainer import (
    PROJECTOR,
    MMedPOTrainer,
    PreferenceCollator,
    adapter_config,
    preference_dataset,
    preference_loss,
)

TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in "
    "message['content'] %}"
    "{{ '<image>\n' if item['type'] == 'image' else item['text'] }}{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
WORDS = (
    "is there a nodule effusion where the film yes no left right upper lower zone shows "
    "heart normal"
).split()


def tiny_lvlm(folder: Path) -> Path:
    """Save a random LLaVA (vision tower, projector and two Mistral layers of width 32) with its
    processor.
    """
    names = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", ":", "?", ".", *WORDS]
    words = Tokenizer(
        models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    width = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    set_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**width, image_size=28, patch_size=14),
            text_config=MistralConfig(
                **width,
                num_key_value_heads=1,
                vocab_size=len(names),
                initializer_range=0.2,
                max_position_embeddings=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
            image_token_index=4,
            image_seq_length=4,
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
        )
    )
    model.save_pretrained(folder)
    return folder


def tiny_pairs(folder: Path, count: int = 24) -> list[dict]:
    """Manifest rows, every second one visual, with their images in ``folder``/images and
    ``folder``/noised.
    """
    random, rows = np.random.default_rng(0), []
    for number in range(count):
        for name in ("images", "noised"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (28, 28), dtype=np.uint8)).save(
                folder / name / f"{number}.png"
            )
        question = {"from": "human", "value": f"<image>\nis there a {WORDS[3 + number % 2]} ?"}
        answers = ("yes . left zone", "yes . left zone" if number % 2 else "no .")
        rows.append(
            {
                "id": number,
                "image": f"{number}.png",
                "rejected_image": f"{number}.png" if number % 2 else None,
                "weighted_score": float(random.random()),
                "patient_id": f"p{number // 2}",
                "conversations": [question, {"from": "gpt", "value": answers[0]}],
                "rejected_conversations": [question, {"from": "gpt", "value": answers[1]}],
            }
        )
    return rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "model": tiny_lvlm(folder / "model"),
        "rows": tiny_pairs(folder),
        "images": folder / "images",
        "noised": folder / "noised",
        "processor": LlavaProcessor.from_pretrained(folder / "model"),
    }


def lora() -> LoraConfig:
    return adapter_config(rank=4, alpha=8, dropout=0.0)


def arguments(folder: Path, **changes) -> DPOConfig:
    values = {
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "beta": 0.3,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "report_to": "none",
        "save_strategy": "no",
        "max_length": 64,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
    }
    return DPOConfig(output_dir=str(folder), **{**values, **changes})


PLAIN = {"shared_prefix": False, "cache_reference": False}


def trainer(
    tiny: dict,
    folder: Path,
    rows=None,
    weights=None,
    projector_rate=1e-2,
    evaluation=None,
    shared_prefix=True,
    cache_reference=True,
    reference="initial",
    reference_cache=None,
    max_length=64,
    trains=("lora", "projector"),
    attention="sdpa",
    plain=False,
    **changes,
) -> MMedPOTrainer:
    def dataset(rows, weights):
        return preference_dataset(
            rows, weights, tiny["processor"], tiny["images"], tiny["noised"], max_length
        )

    rows = tiny["rows"] if rows is None else rows
    model = LlavaForConditionalGeneration.from_pretrained(tiny["model"])
    model.model.language_model.set_attn_implementation(attention)
    options = {
        "projector_learning_rate": projector_rate,
        "reference": reference,
        "args": arguments(folder, max_length=max_length, **changes),
        "train_dataset": dataset(rows, np.ones(len(rows)) if weights is None else weights),
        "eval_dataset": dataset(evaluation, np.ones(len(evaluation))) if evaluation else None,
        "processing_class": tiny["processor"],
        "peft_config": adapter_config(4, 8, 0.0, trains),
    }
    if plain:
        collator = PreferenceCollator(0, max_length, tiny["processor"])
        return MMedPOTrainer(model, data_collator=collator, **options)
    collator = PackingCollator(0, max_length, tiny["processor"], shared_prefix=shared_prefix)
    return FastTrainer(
        model,
        data_collator=collator,
        cache_reference=cache_reference,
        reference_cache=reference_cache,
        **options,
    )


def batch_of(run: MMedPOTrainer, count: int) -> dict:
    return run.data_collator([run.train_dataset[number] for number in range(count)])


def answer_logps(model: LlavaForConditionalGeneration, batch: dict) -> torch.Tensor:
    """Log-probabilities by transformers alone, one answer at a time, without padding or masks.
    Shape: [2B].
    """
    sums = []
    for owner in range(2 * len(batch["weights"])):
        mine = batch["answer_owners"] == owner
        row, first = int(batch["answer_rows"][mine][0]), int(batch["answer_positions"][mine][0])
        prompt, answer = batch["input_ids"][row][: first + 1], batch["answer_ids"][mine]
        with torch.no_grad():
            logits = model(
                input_ids=torch.cat([prompt, answer])[None],
                pixel_values=batch["pixel_values"][batch["image_rows"][row]][None],
            ).logits[0]
        found = logits[first:-1].log_softmax(-1)
        sums.append(found.gather(1, answer[:, None]).sum())
    return torch.stack(sums)


def computed_reference(run: MMedPOTrainer, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference log-probabilities by the model itself, whatever a cache says. Shape: [B]
    each.
    """
    return MMedPOTrainer.reference_logps(run, batch)


def losses(run: DPOTrainer, key: str = "loss") -> list[float]:
    run.train()
    return [event[key] for event in run.state.log_history if key in event]


def test_preference_loss_and_its_gradient_match_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    logps = [
        (-5 * torch.rand(6, generator=generator, dtype=torch.float64)).requires_grad_()
        for _ in range(4)
    ]
    weights, beta = torch.linspace(0.75, 1.25, 6, dtype=torch.float64), 0.3
    found = preference_loss(*logps, beta, weights)
    margins = ((logps[0] - logps[2]) - (logps[1] - logps[3])).detach()
    torch.testing.assert_close(found, weights * torch.log1p(torch.exp(-beta * margins)))
    found.sum().backward()
    slope = -weights * beta / (1 + torch.exp(beta * margins))
    for tensor, sign in zip(logps, (1, -1, -1, 1)):
        torch.testing.assert_close(tensor.grad, sign * slope)
    equal = torch.full((3,), -2.0)
    torch.testing.assert_close(
        preference_loss(equal, equal, equal, equal, beta), torch.full((3,), math.log(2))
    )


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_the_collator_gives_each_answer_its_own_image(tiny, shared_prefix):
    rows = tiny["rows"][:4]
    pairs = preference_dataset(
        rows, [0.8, 0.9, 1.0, 1.1], tiny["processor"], tiny["images"], tiny["noised"], 64
    )
    collator = PackingCollator(0, 64, tiny["processor"], shared_prefix=shared_prefix)
    batch = collator([pairs[number] for number in range(4)])
    assert (
        len(batch["input_ids"]) == (6 if shared_prefix else 8) and len(batch["pixel_values"]) == 6
    )
    for owner, folder in (
        (1, "images"),
        (5, "noised"),
    ):  # the chosen and the rejected answer of a visual pair
        image = Image.open(tiny[folder] / "1.png").convert("RGB")
        whole = tiny["processor"](
            images=image,
            text="USER: <image>\nis there a effusion ? ASSISTANT: yes . left zone</s>",
            return_tensors="pt",
        )
        row = int(batch["answer_rows"][batch["answer_owners"] == owner][0])
        torch.testing.assert_close(
            batch["pixel_values"][batch["image_rows"][row]], whole["pixel_values"][0]
        )
        length = whole["input_ids"].shape[1]
        assert batch["input_ids"][row][:length].tolist() == whole["input_ids"][0].tolist()
        assert not batch["input_ids"][row][length:].any()
    answer = batch["answer_ids"][batch["answer_owners"] == 4]
    assert tiny["processor"].tokenizer.decode(answer).replace(" ", "") == "no.</s>"
    assert batch["weights"].tolist() == pytest.approx([0.8, 0.9, 1.0, 1.1]) and batch[
        "visual"
    ].tolist() == [0, 1, 0, 1]
    assert int(batch["tokens"].sum()) == int((batch["input_ids"] != 0).sum())
    assert image_token_count(tiny["processor"]) == 4


@pytest.mark.parametrize(
    ("switches", "encoded"),
    [({}, [6, 6]), ({"cache_reference": False}, [6, 6, 6, 6]), ({"plain": True}, [8, 8, 8, 8])],
)
def test_each_different_image_of_a_forward_pass_is_encoded_once(tiny, tmp_path, switches, encoded):
    run, seen = trainer(tiny, tmp_path, tiny["rows"][:4], max_steps=2, **switches), []
    embeddings, compute = run.model.get_base_model().model.vision_tower.embeddings, run.compute_loss

    def watched(*arguments, **options):
        with embeddings.register_forward_pre_hook(
            lambda module, arguments: seen.append(len(arguments[0]))
        ):
            return compute(*arguments, **options)

    run.compute_loss = watched
    run.train()
    assert seen == encoded


def test_the_plain_batch_is_the_one_in_the_collators_docstring(tiny):
    image = str(tiny["images"] / "0.png")
    noised = str(tiny["noised"] / "0.png")
    shared = {
        "chosen_ids": [7],
        "image": image,
        "rejected_image": noised,
        "weight": 1.0,
        "visual": True,
    }
    pairs = [
        {**shared, "prompt_ids": [1, 2, 3], "rejected_ids": [8, 9]},
        {**shared, "prompt_ids": [1, 4], "rejected_ids": [5], "visual": False},
    ]
    batch = PreferenceCollator(0, 64, tiny["processor"])(pairs)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 7, 0],
        [1, 4, 7, 0, 0],
        [1, 2, 3, 8, 9],
        [1, 4, 5, 0, 0],
    ]
    assert batch.answer_mask.int().tolist() == [
        [0, 0, 0, 1, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1],
        [0, 0, 1, 0, 0],
    ]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0],
    ]
    assert (
        batch.chosen_lengths.tolist() == [1, 1]
        and batch.tokens.tolist() == [9, 6]
        and batch.visual.tolist() == [1, 0]
    )
    for row, path in enumerate([image, image, noised, noised]):
        expected = tiny["processor"].image_processor(
            images=Image.open(path).convert("RGB"), return_tensors="pt"
        )
        assert torch.equal(batch.pixel_values[row], expected["pixel_values"][0])
    cut = PreferenceCollator(0, 4, tiny["processor"])(pairs)
    assert cut.input_ids[2].tolist() == [1, 2, 3, 8] and cut.tokens.tolist() == [8, 6]


def test_the_packed_batch_is_the_one_in_the_collators_docstring(tiny):
    image = str(tiny["images"] / "0.png")
    pair = {
        "prompt_ids": [1, 2, 3],
        "chosen_ids": [7],
        "rejected_ids": [8, 9],
        "image": image,
        "rejected_image": image,
        "weight": 1.0,
        "visual": False,
    }
    batch = PackingCollator(0, 64, tiny["processor"])([pair])
    assert batch.input_ids.tolist() == [[1, 2, 3, 7, 8, 9]] and batch.position_ids.tolist() == [
        [0, 1, 2, 3, 3, 4]
    ]
    assert batch.branches.tolist() == [[0, 0, 0, 1, 2, 2]]
    assert batch.answer_ids.tolist() == [7, 8, 9] and batch.answer_owners.tolist() == [0, 1, 1]
    assert batch.answer_positions.tolist() == [2, 2, 4]


def test_the_plain_trainer_hooks_and_replaces_nothing_that_trls_does_not(tiny, tmp_path):
    def touched(run):
        found = set()
        for name, module in run.model.named_modules():
            hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
            if any(hooks) or "forward" in vars(module):
                found.add((name, *hooks, "forward" in vars(module)))
        return found

    run = trainer(tiny, tmp_path, plain=True)
    assert touched(run) == touched(stock_trainer(tiny, tmp_path, tiny["rows"][:4:2]))
    assert run.train_dataset.column_names == [
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "image",
        "rejected_image",
        "weight",
        "visual",
    ]


def test_what_is_trained_in_bfloat16_moves_in_32_bits():
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    layer.bias.requires_grad_(False)
    train_in_32_bits(layer)
    assert layer.weight.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(tiny):
    with pytest.raises(InputError, match="pair 0.*training.max_length"):
        preference_dataset(
            tiny["rows"], [1.0] * 24, tiny["processor"], tiny["images"], tiny["noised"], 8
        )


def stock_trainer(tiny: dict, folder: Path, rows: list[dict]) -> DPOTrainer:
    """TRL's own trainer on text pairs."""

    def message(role, row, key):
        return [
            {
                "role": role,
                "content": row[key][role == "assistant"]["value"].replace("<image>\n", ""),
            }
        ]

    return DPOTrainer(
        LlavaForConditionalGeneration.from_pretrained(tiny["model"]),
        args=arguments(folder, train_sampling_strategy="sequential"),
        peft_config=lora(),
        processing_class=tiny["processor"],
        train_dataset=Dataset.from_list(
            [
                {
                    "images": [Image.open(tiny["images"] / row["image"]).convert("RGB")],
                    "prompt": message("user", row, "conversations"),
                    "chosen": message("assistant", row, "conversations"),
                    "rejected": message("assistant", row, "rejected_conversations"),
                }
                for row in rows
            ]
        ),
    )


def test_with_equal_images_and_weights_of_one_every_loss_is_trls(tiny, tmp_path):
    rows = [row for row in tiny["rows"] if row["rejected_image"] is None]
    expected = losses(stock_trainer(tiny, tmp_path, rows))
    ours = trainer(tiny, tmp_path, rows, train_sampling_strategy="sequential")
    assert losses(ours) == pytest.approx(expected, abs=1e-5) and len(expected) == 5
    assert (
        expected[0] == pytest.approx(math.log(2), abs=1e-5)
        and abs(expected[-1] - expected[0]) > 1e-2
    )
    for switches in (PLAIN, {"plain": True}):
        other = trainer(tiny, tmp_path, rows, **switches, train_sampling_strategy="sequential")
        assert losses(other) == pytest.approx(expected, abs=1e-5)


def uneven_rows(tiny: dict) -> list[dict]:
    """Eight pairs whose questions and answers have all kinds of lengths."""
    random, rows = np.random.default_rng(1), []
    for row in tiny["rows"][:8]:
        question, chosen, rejected = (
            " ".join(random.choice(WORDS, count))
            for count in random.integers([2, 1, 1], [9, 12, 12])
        )
        turn = {"from": "human", "value": f"<image>\n{question}"}
        rows.append(
            {
                **row,
                "conversations": [turn, {"from": "gpt", "value": chosen}],
                "rejected_conversations": [turn, {"from": "gpt", "value": rejected}],
            }
        )
    return rows


def wake(model: torch.nn.Module) -> None:
    """Move LoRA and projector off their start, where half of the gradients are zero."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def first_step(run: MMedPOTrainer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The pairs' recorded values, in rising order of their loss, and the gradients of the first
    optimiser step.
    """
    gradients, records, log_pairs = {}, [], run._log_pairs

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **others):
            gradients.update(
                {
                    name: parameter.grad.clone()
                    for name, parameter in model.named_parameters()
                    if parameter.requires_grad
                }
            )

    run._log_pairs = lambda pairs, mode: (
        records.append(torch.stack(list(pairs.values()), 1)) or log_pairs(pairs, mode)
    )
    run.add_callback(Watch())
    wake(run.model)
    run.train()
    pairs = torch.cat(records)
    return pairs[pairs[:, 0].argsort()], gradients


def first_step_by_hand(run: MMedPOTrainer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same with one answer at a time, by transformers and PEFT alone, and the loss written
    out.
    """
    wake(run.model)
    model, processor, pairs = run.model, run.processing_class, []

    def logp(pair, answer, image):
        answer = pair[answer][: run.args.max_length - len(pair["prompt_ids"])]
        ids = torch.tensor([[*pair["prompt_ids"], *answer]])
        pixels = processor.image_processor(
            Image.open(pair[image]).convert("RGB"), return_tensors="pt"
        )["pixel_values"]
        found = (
            model(input_ids=ids, pixel_values=pixels)
            .logits[0, -len(answer) - 1 : -1]
            .log_softmax(-1)
        )
        return found.gather(1, torch.tensor(answer)[:, None]).sum()

    for pair in run.train_dataset:
        policy = [logp(pair, "chosen_ids", "image"), logp(pair, "rejected_ids", "rejected_image")]
        with torch.no_grad(), model.disable_adapter():
            reference = [
                logp(pair, "chosen_ids", "image"),
                logp(pair, "rejected_ids", "rejected_image"),
            ]
        margin = policy[0] - reference[0] - policy[1] + reference[1]
        pairs.append(
            torch.stack(
                [pair["weight"] * torch.log1p(torch.exp(-run.beta * margin)), *policy, *reference]
            )
        )
    pairs = torch.stack(pairs)
    pairs[:, 0].mean().backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return pairs[pairs[:, 0].argsort()].detach(), gradients


WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
SWITCHES = [
    {},
    {"plain": True},
    PLAIN,
    *({key: False} for key in PLAIN),
    {"attention": "eager"},
    {"train_sampling_strategy": "group_by_length"},
    {"plain": True, "train_sampling_strategy": "group_by_length"},
    # All eight pairs in one batch: read in two parts.
    WHOLE,
    {**WHOLE, **PLAIN},
    {**WHOLE, "attention": "eager"},
]


@pytest.mark.parametrize("max_length", [64, 17])
def test_every_switch_gives_the_losses_and_gradients_of_one_answer_at_a_time(
    tiny, tmp_path, max_length
):
    def made(**switches):
        return trainer(
            tiny,
            tmp_path,
            uneven_rows(tiny),
            np.linspace(0.75, 1.25, 8),
            max_length=max_length,
            max_steps=1,
            max_grad_norm=0.0,
            **({"gradient_accumulation_steps": 2} | switches),
        )

    cut = [
        len(pair["prompt_ids"]) + len(pair["chosen_ids"]) > max_length
        for pair in made().train_dataset
    ]
    assert any(cut) == (max_length < 64)
    expected, expected_gradients = first_step_by_hand(made())
    assert min(gradient.abs().max() for gradient in expected_gradients.values()) > 1e-4, (
        "no gradient is trivially zero"
    )
    for switches in SWITCHES:
        pairs, gradients = first_step(made(**switches))
        torch.testing.assert_close(pairs[:, :5], expected, atol=1e-5, rtol=1e-6)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected_gradients[name], atol=1e-5, rtol=0, msg=f"{switches} {name}"
            )


def test_a_large_batch_is_read_in_the_two_parts_that_save_the_most_padding(tiny, tmp_path):
    run = trainer(tiny, tmp_path, uneven_rows(tiny))
    batch = batch_of(run, 8)
    lengths = sorted(batch.row_lengths)
    parts = halves(batch)
    assert len(parts) == 2 and sum(part.input_ids.shape[0] for part in parts) == len(lengths)
    fewest = min(
        first * lengths[first - 1] + (len(lengths) - first) * lengths[-1]
        for first in range(1, len(lengths))
    )
    assert sum(part.input_ids.numel() for part in parts) == fewest < batch.input_ids.numel()
    owners = torch.cat([part.answer_owners for part in parts])
    assert sorted(owners.tolist()) == sorted(batch.answer_owners.tolist())
    for part in parts:
        assert len(part.pixel_values) == len(part.image_rows.unique())
    few = batch_of(run, 7)
    assert halves(few) == [few]


def test_the_first_loss_is_the_mean_weight_times_ln_2(tiny, tmp_path):
    weights = np.linspace(0.75, 1.25, 24)
    run = trainer(tiny, tmp_path, weights=weights, per_device_train_batch_size=24, max_steps=1)
    assert losses(run) == pytest.approx([weights.mean() * math.log(2)], abs=1e-5)
    event = run.state.log_history[0]
    assert event["weight"] == pytest.approx(1.0) and event["margin"] == pytest.approx(0, abs=1e-6)
    assert event["chosen_logp"] < 0 and {"text_accuracy", "visual_accuracy"} <= set(event)
    # Policy and reference are one model: no pair is ranked right, and none wrong.
    assert event["accuracy"] == pytest.approx(0.5, abs=0.25)


def test_with_the_adapter_off_the_trained_model_is_the_one_before_training(tiny, tmp_path):
    run = trainer(tiny, tmp_path)
    batch = batch_of(run, 8)
    before = torch.cat(computed_reference(run, batch))
    torch.testing.assert_close(
        torch.cat(run.compute_logps(run.model, batch)).detach(), before, atol=1e-6, rtol=0
    )
    projector = {
        name: value.clone()
        for name, value in run.model.named_parameters()
        if "multi_modal_projector" in name
    }
    run.train()
    torch.testing.assert_close(torch.cat(computed_reference(run, batch)), before, atol=1e-6, rtol=0)
    assert (torch.cat(run.compute_logps(run.model, batch)) - before).abs().max() > 1e-2
    moved = {
        name: not torch.equal(value, dict(run.model.named_parameters())[name])
        for name, value in projector.items()
    }
    assert all(changed == ("modules_to_save" in name) for name, changed in moved.items()) and any(
        moved.values()
    )


def test_the_released_reference_drifts_with_the_projector_and_with_nothing_else(tiny, tmp_path):
    run = trainer(tiny, tmp_path, reference="released")
    batch = batch_of(run, 8)
    before = torch.cat(computed_reference(run, batch))
    assert losses(run)[0] == pytest.approx(losses(trainer(tiny, tmp_path))[0], abs=1e-6)
    after = torch.cat(computed_reference(run, batch))
    assert (
        (after - before).abs().max() > 1e-3 and not after.requires_grad and not run.known_reference
    )
    by_hand = LlavaForConditionalGeneration.from_pretrained(tiny["model"])
    trained = (
        run.model.get_base_model()
        .model.multi_modal_projector.modules_to_save["default"]
        .state_dict()
    )
    by_hand.model.multi_modal_projector.load_state_dict(trained)
    torch.testing.assert_close(answer_logps(by_hand, batch), after, atol=1e-5, rtol=0)
    still = trainer(tiny, tmp_path, reference="released", trains=["lora"])
    still.train()
    torch.testing.assert_close(
        torch.cat(computed_reference(still, batch)), before, atol=1e-6, rtol=0
    )


def test_lora_sits_on_the_language_model_only_and_the_projector_has_its_own_rate(tiny, tmp_path):
    run = trainer(tiny, tmp_path, projector_rate=2e-3, max_steps=1)
    names = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    assert not any("vision_tower" in name or "lm_head" in name for name in names)
    assert sum("lora_A" in name for name in names) == 2 * 7
    language, projector = run.create_optimizer().param_groups
    assert (language["lr"], projector["lr"]) == (1e-2, 2e-3)
    assert len(language["params"]) == 2 * 2 * 7 and len(projector["params"]) == 4
    frozen = trainer(tiny, tmp_path, projector_rate=0.0, max_steps=2)
    before = {
        name: value.clone()
        for name, value in frozen.model.named_parameters()
        if "modules_to_save" in name
    }
    frozen.train()
    assert all(
        torch.equal(value, dict(frozen.model.named_parameters())[name])
        for name, value in before.items()
    )


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_sft_is_the_mean_negative_log_probability_of_the_chosen_tokens(
    tiny, tmp_path, shared_prefix
):
    run = trainer(
        tiny,
        tmp_path,
        loss_type="sft",
        weights=np.linspace(0.5, 1.5, 24),
        max_steps=1,
        per_device_train_batch_size=24,
        shared_prefix=shared_prefix,
    )
    batch = batch_of(run, 24)
    chosen = answer_logps(LlavaForConditionalGeneration.from_pretrained(tiny["model"]), batch)[:24]
    expected = -chosen.sum() / (batch["answer_owners"] < 24).sum()
    assert losses(run) == pytest.approx([expected.item()], abs=1e-5)


def test_validation_pairs_are_scored_in_the_same_terms(tiny, tmp_path):
    run = trainer(
        tiny,
        tmp_path,
        tiny["rows"][:16],
        evaluation=tiny["rows"][16:],
        eval_strategy="steps",
        eval_steps=2,
    )
    run.precompute_reference()
    run.train()
    events = [event for event in run.state.log_history if "eval_loss" in event]
    assert [event["step"] for event in events] == [
        2,
        4,
        5,
    ]  # transformers looks once more at the end
    assert all(
        event["eval_chosen_logp"] < 0 and 0 <= event["eval_accuracy"] <= 1 for event in events
    )


def test_the_reference_cache_is_read_checked_and_extended(tiny, tmp_path, monkeypatch):
    def run(rows):
        made, scored = (
            trainer(tiny, tmp_path, rows, reference_cache=tmp_path / "reference.json"),
            [],
        )
        compute = made._compute_reference
        monkeypatch.setattr(
            made, "_compute_reference", lambda pairs: scored.append(len(pairs)) or compute(pairs)
        )
        made.precompute_reference()
        return made, sum(scored)

    first, scored = run(tiny["rows"][:16])
    assert scored == 16
    second, scored = run(tiny["rows"])
    assert scored == 4 + 8, "four known pairs are checked, eight new ones computed"
    assert (
        len(second.known_reference) == 24
        and first.known_reference.items() <= second.known_reference.items()
    )
    stored = json.loads((tmp_path / "reference.json").read_text())["values"]
    wrong = {key: [value + 1 for value in pair] for key, pair in stored.items()}
    digest = hashlib.sha256(json.dumps(wrong, sort_keys=True).encode()).hexdigest()
    (tmp_path / "reference.json").write_text(json.dumps({"sha256": digest, "values": wrong}))
    third, scored = run(tiny["rows"])
    assert scored == 4 + 24, "values of another model are not used"
    for key, values in second.known_reference.items():
        assert third.known_reference[key] == pytest.approx(values, abs=1e-4)
    stored = json.loads((tmp_path / "reference.json").read_text())
    stored["values"][next(reversed(stored["values"]))][0] += 0.001
    for damaged in ('{"half', "[]", "7", json.dumps(stored)):
        (tmp_path / "reference.json").write_text(damaged)
        assert run(tiny["rows"])[1] == 24, "a damaged file is written anew"
    assert len(json.loads((tmp_path / "reference.json").read_text())["values"]) == 24
    data = first.train_dataset
    assert len({pair_key(pair, 64) for pair in data}) == 16
    assert pair_key(data[0], 64) != pair_key(data[0], 63)


@pytest.mark.parametrize(
    "changed", ["image", "rejected_image", "prompt_ids", "chosen_ids", "rejected_ids"]
)
def test_the_key_of_a_pair_follows_its_tokens_and_both_its_images(tmp_path, changed):
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
    for name in ("image", "rejected_image"):
        (tmp_path / name).write_bytes(name.encode())
        pair[name] = str(tmp_path / name)
    before = pair_key(pair, 64)
    if changed.endswith("image"):
        (tmp_path / changed).write_bytes(b"another")
    else:
        pair[changed] = [*pair[changed], 5]
    assert pair_key(pair, 64) != before


@pytest.mark.parametrize("trains", [("lora",), ("projector",), ("lora", "projector")])
def test_lora_or_projector_can_be_trained_alone_and_the_adapter_loads_in_peft(
    tiny, tmp_path, trains
):
    run = trainer(tiny, tmp_path, trains=trains)
    batch = batch_of(run, 8)
    assert {
        PROJECTOR if PROJECTOR in name else "lora"
        for name, parameter in run.model.named_parameters()
        if parameter.requires_grad
    } == {"projector": {PROJECTOR}, "lora": {"lora"}}.get(trains[-1], {"lora"}) | (
        {"lora"} if "lora" in trains else set()
    )
    before = torch.cat(computed_reference(run, batch))
    values = losses(run)
    assert values[0] == pytest.approx(math.log(2), abs=1e-6) and abs(values[-1] - values[0]) > 1e-3
    torch.testing.assert_close(torch.cat(computed_reference(run, batch)), before, atol=1e-6, rtol=0)
    run.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(tiny["model"]), tmp_path / "adapter"
    )
    found = torch.cat(run.compute_logps(run.model, batch)).detach()
    torch.testing.assert_close(answer_logps(loaded, batch), found, atol=1e-5, rtol=0)
    assert (found - before).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])  # TRL sets it under ZeRO stage 3
def test_gradient_checkpointing_changes_nothing(tiny, tmp_path, reentrant):
    plain, checkpointed = (
        first_step(trainer(tiny, tmp_path, uneven_rows(tiny), max_steps=1, **changes))
        for changes in (
            PLAIN,
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
                "cache_reference": False,
            },
        )
    )
    torch.testing.assert_close(checkpointed[0][:, :7], plain[0][:, :7], atol=1e-5, rtol=1e-6)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(checkpointed[1][name], gradient, atol=1e-5, rtol=0)


def test_the_log_tells_each_source_apart_and_counts_the_tokens_read(tiny, tmp_path):
    rows, weights = uneven_rows(tiny), np.linspace(0.75, 1.25, 8)
    run = trainer(
        tiny,
        tmp_path,
        rows,
        weights,
        evaluation=rows,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        per_device_eval_batch_size=3,
    )
    records, log_pairs = [], run._log_pairs
    run._log_pairs = lambda pairs, mode: (
        records.append((mode == "train", torch.stack(list(pairs.values()), 1)))
        or log_pairs(pairs, mode)
    )
    run.train()
    logs = {"": run.state.log_history[0], "eval_": run.state.log_history[1]}
    for prefix, log in logs.items():
        pairs = torch.cat([pairs for training, pairs in records if training == (prefix == "")])
        loss, chosen, rejected, reference_chosen, reference_rejected, weight, visual, tokens = (
            pairs.unbind(1)
        )
        rewards = {
            "chosen_reward": 0.3 * (chosen - reference_chosen),
            "rejected_reward": 0.3 * (rejected - reference_rejected),
        }
        rewards["margin"] = rewards["chosen_reward"] - rewards["rejected_reward"]
        whole = {"weight": weight, "chosen_logp": chosen, "rejected_logp": rejected, **rewards}
        assert len(pairs) == 8
        for key, value in whole.items():
            assert log[prefix + key] == pytest.approx(value.mean().item(), abs=1e-5)
        for number, source in enumerate(("text", "visual")):
            for key, value in {"loss": loss, "chosen_logp": chosen, **rewards}.items():
                assert log[f"{prefix}{source}_{key}"] == pytest.approx(
                    value[visual == number].mean().item(), abs=1e-5
                )
            assert 0 <= log[f"{prefix}{source}_accuracy"] <= 1
        data = run.train_dataset
        real = sum(
            len(pair["prompt_ids"]) * (2 if pair["visual"] else 1)
            + len(pair["chosen_ids"])
            + len(pair["rejected_ids"])
            for pair in data
        )
        assert log[prefix + "tokens"] == real


def test_pairs_of_like_length_come_together_in_an_order_that_seed_and_epoch_decide(tiny, tmp_path):
    rows = uneven_rows(tiny) * 5
    run = trainer(
        tiny,
        tmp_path,
        [{**row, "id": number} for number, row in enumerate(rows)],
        train_sampling_strategy="group_by_length",
        max_steps=1,
    )
    lengths, order = run.row_lengths(run.train_dataset), {}
    for epoch in (0, 1):
        run.state.epoch = float(epoch)
        torch.rand(epoch + 1)
        order[epoch] = list(run._get_train_sampler())
        assert (
            sorted(order[epoch]) == list(range(40))
            and list(run._get_train_sampler()) == order[epoch]
        )
    spread = [
        max(lengths[n] for n in batch) - min(lengths[n] for n in batch)
        for batch in (order[0][start : start + 4] for start in range(0, 40, 4))
    ]
    assert order[0] != order[1] and np.mean(spread) < 0.5 * (max(lengths) - min(lengths))
    for pair, length in zip(run.train_dataset, lengths):
        assert length == run.data_collator([pair])["input_ids"].shape[1]


def test_flex_attention_on_a_cpu_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="training.attention.*GPU.*sdpa"):
        trainer(tiny, tmp_path, attention="flex_attention")


def test_attention_that_reaches_less_than_a_row_back_is_refused_with_shared_rows(
    tiny, tmp_path, monkeypatch
):
    window = LlavaForConditionalGeneration.from_pretrained(tiny["model"])
    window.config.text_config.sliding_window = 16
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", lambda *_: window)
    with pytest.raises(InputError, match="training.shared_prefix.*16 tokens"):
        trainer(tiny, tmp_path)


def test_a_resumed_run_has_the_reference_of_the_model_before_training(tiny, tmp_path):
    first = trainer(tiny, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    resumed = trainer(tiny, tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.known_reference.keys() == first.known_reference.keys()
    for key, values in first.known_reference.items():
        assert resumed.known_reference[key] == pytest.approx(values, abs=1e-6)
    assert resumed.state.global_step == 3


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch compiles FlexAttention with a C++ compiler"
)
def test_flex_attention_gives_the_same_log_probabilities(tiny, tmp_path):
    sdpa, flex = (trainer(tiny, tmp_path, uneven_rows(tiny)) for _ in range(2))
    flex.model.get_base_model().model.language_model.set_attn_implementation("flex_attention")
    flex.attention = "flex_attention"
    batch = batch_of(sdpa, 8)
    torch.testing.assert_close(
        torch.cat(computed_reference(flex, batch)),
        torch.cat(computed_reference(sdpa, batch)),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_run_resumed_within_its_second_epoch_sees_the_pairs_that_it_would_have_seen(
    tiny, tmp_path, strategy
):
    def made(steps):
        return trainer(
            tiny,
            tmp_path,
            uneven_rows(tiny) * 2,
            max_steps=steps,
            train_sampling_strategy=strategy,
            save_strategy="steps",
            save_steps=6,
        )

    whole, resumed = made(8), made(8)
    expected = losses(whole)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    found = [event["loss"] for event in resumed.state.log_history if "loss" in event]
    assert found == pytest.approx(expected, abs=1e-6) and len(found) == 8
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, atol=1e-6, rtol=0)

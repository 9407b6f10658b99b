"""The weighted loss against closed forms, and MMedPOTrainer against TRL's own trainer on a tiny random LLaVA."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
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
    set_seed,
)
from trl import DPOConfig, DPOTrainer

from mmedpo_utils.errors import InputError
from mmedpo_utils.trainer import (
    MMedPOTrainer,
    PreferenceCollator,
    image_token_count,
    pair_keys,
    preference_dataset,
    preference_loss,
)

TEMPLATE = ("{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
            "{{ '<image>\n' if item['type'] == 'image' else item['text'] }}{% endfor %}{% endif %}"
            "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}")
WORDS = "is there a nodule effusion where the film yes no left right upper lower zone shows heart normal".split()


def tiny_lvlm(folder: Path) -> Path:
    """Save a random LLaVA (vision tower, projector and two Mistral layers of width 32) with its processor."""
    names = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", ":", "?", ".", *WORDS]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>", additional_special_tokens=["<image>"])
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token="<image>",
                   num_additional_image_tokens=1, chat_template=TEMPLATE).save_pretrained(folder)
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    set_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(**width, image_size=28, patch_size=14),
        text_config=MistralConfig(**width, num_key_value_heads=1, vocab_size=len(names), initializer_range=0.2,
                                  max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        image_token_index=4, image_seq_length=4, vision_feature_select_strategy="default", vision_feature_layer=-2))
    model.save_pretrained(folder)
    return folder


def tiny_pairs(folder: Path, count: int = 24) -> list[dict]:
    """Manifest rows, every second one visual, with their images in ``folder``/images and ``folder``/noised."""
    random, rows = np.random.default_rng(0), []
    for number in range(count):
        for name in ("images", "noised"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (28, 28), dtype=np.uint8)).save(folder / name / f"{number}.png")
        question = {"from": "human", "value": f"<image>\nis there a {WORDS[3 + number % 2]} ?"}
        answers = ("yes . left zone", "yes . left zone" if number % 2 else "no .")
        rows.append({"id": number, "image": f"{number}.png", "rejected_image": f"{number}.png" if number % 2 else None,
                     "weighted_score": float(random.random()), "patient_id": f"p{number // 2}",
                     "conversations": [question, {"from": "gpt", "value": answers[0]}],
                     "rejected_conversations": [question, {"from": "gpt", "value": answers[1]}]})
    return rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tiny")
    return {"model": tiny_lvlm(folder / "model"), "rows": tiny_pairs(folder), "images": folder / "images",
            "noised": folder / "noised", "processor": LlavaProcessor.from_pretrained(folder / "model")}


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["multi_modal_projector"],
                      exclude_modules=r".*(vision_tower|multi_modal_projector).*")


def arguments(folder: Path, **changes) -> DPOConfig:
    values = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "beta": 0.3, "logging_steps": 1,
              "bf16": False,
              "gradient_checkpointing": False, "remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True,
              "seed": 3, "report_to": "none", "save_strategy": "no", "max_length": 64, "lr_scheduler_type": "constant",
              "optim": "adamw_torch"}
    return DPOConfig(output_dir=str(folder), **{**values, **changes})


def trainer(tiny: dict, folder: Path, rows=None, weights=None, projector_rate=1e-2, evaluation=None, **changes) -> MMedPOTrainer:
    def dataset(rows, weights):
        return preference_dataset(rows, weights, tiny["processor"], tiny["images"], tiny["noised"], 64)

    rows = tiny["rows"] if rows is None else rows
    return MMedPOTrainer(
        LlavaForConditionalGeneration.from_pretrained(tiny["model"]), projector_learning_rate=projector_rate,
        args=arguments(folder, **changes), train_dataset=dataset(rows, np.ones(len(rows)) if weights is None else weights),
        eval_dataset=dataset(evaluation, np.ones(len(evaluation))) if evaluation else None,
        data_collator=PreferenceCollator(0, max_length=64, processor=tiny["processor"]),
        processing_class=tiny["processor"], peft_config=lora())


def losses(run: DPOTrainer, key: str = "loss") -> list[float]:
    run.train()
    return [event[key] for event in run.state.log_history if key in event]


def test_preference_loss_and_its_gradient_match_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    logps = [(-5 * torch.rand(6, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    weights, beta = torch.linspace(0.75, 1.25, 6, dtype=torch.float64), 0.3
    found = preference_loss(*logps, beta, weights)
    margins = ((logps[0] - logps[2]) - (logps[1] - logps[3])).detach()
    torch.testing.assert_close(found, weights * torch.log1p(torch.exp(-beta * margins)))
    found.sum().backward()
    slope = -weights * beta / (1 + torch.exp(beta * margins))
    for tensor, sign in zip(logps, (1, -1, -1, 1)):
        torch.testing.assert_close(tensor.grad, sign * slope)
    equal = torch.full((3,), -2.0)
    torch.testing.assert_close(preference_loss(equal, equal, equal, equal, beta), torch.full((3,), math.log(2)))


def test_the_collator_gives_each_half_its_own_image(tiny):
    rows = tiny["rows"][:4]
    pairs = preference_dataset(rows, [0.8, 0.9, 1.0, 1.1], tiny["processor"], tiny["images"], tiny["noised"], 64)
    collator = PreferenceCollator(0, max_length=64, processor=tiny["processor"])
    batch = collator([pairs[number] for number in range(4)])
    for place, folder in ((0, "images"), (1, "noised")):
        image = Image.open(tiny[folder] / "1.png").convert("RGB")
        whole = tiny["processor"](images=image, text="USER: <image>\nis there a effusion ? ASSISTANT: yes . left zone</s>",
                                  return_tensors="pt")
        torch.testing.assert_close(batch["pixel_values"][1 + 4 * place], whole["pixel_values"][0])
        kept = batch["attention_mask"][1 + 4 * place].bool()
        assert batch["input_ids"][1 + 4 * place][kept].tolist() == whole["input_ids"][0].tolist()
    torch.testing.assert_close(batch["pixel_values"][0], batch["pixel_values"][4])
    answer = batch["input_ids"][4][batch["completion_mask"][4].bool()]
    assert tiny["processor"].tokenizer.decode(answer).replace(" ", "") == "no.</s>"
    assert batch["weights"].tolist() == pytest.approx([0.8, 0.9, 1.0, 1.1]) and batch["visual"].tolist() == [0, 1, 0, 1]
    assert image_token_count(tiny["processor"]) == 4


def test_an_image_that_both_halves_share_is_encoded_once(tiny):
    tower = LlavaForConditionalGeneration.from_pretrained(tiny["model"]).model.vision_tower.eval()
    chosen = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    rejected = chosen.clone()
    rejected[1], rejected[3] = rejected[1].flip(-1), rejected[3] + 1e-3
    batch, encoded = torch.cat([chosen, rejected]), []
    with torch.no_grad():
        expected = tower(batch, output_hidden_states=True).hidden_states
        tower.embeddings.register_forward_pre_hook(lambda module, arguments: encoded.append(len(arguments[0])))
        share_images(tower)
        found = tower(batch, output_hidden_states=True).hidden_states
    assert encoded == [6] and len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(tiny):
    with pytest.raises(InputError, match="pair 0.*training.max_length"):
        preference_dataset(tiny["rows"], [1.0] * 24, tiny["processor"], tiny["images"], tiny["noised"], 8)


def test_with_equal_images_and_weights_of_one_every_loss_is_trls(tiny, tmp_path):
    rows = [row for row in tiny["rows"] if row["rejected_image"] is None]
    def message(role, row, key):
        return [{"role": role, "content": row[key][role == "assistant"]["value"].replace("<image>\n", "")}]

    stock = DPOTrainer(
        LlavaForConditionalGeneration.from_pretrained(tiny["model"]), args=arguments(tmp_path), peft_config=lora(),
        processing_class=tiny["processor"], train_dataset=Dataset.from_list([
            {"images": [Image.open(tiny["images"] / row["image"]).convert("RGB")],
             "prompt": message("user", row, "conversations"), "chosen": message("assistant", row, "conversations"),
             "rejected": message("assistant", row, "rejected_conversations")} for row in rows]))
    expected = losses(stock)
    ours = trainer(tiny, tmp_path, rows)
    assert losses(ours) == pytest.approx(expected, abs=1e-5) and len(expected) == 5
    assert expected[0] == pytest.approx(math.log(2), abs=1e-5) and abs(expected[-1] - expected[0]) > 1e-2
    precomputed = trainer(tiny, tmp_path, rows)
    precomputed.precompute_reference()
    assert losses(precomputed) == pytest.approx(expected, abs=1e-5)


def test_the_first_loss_is_the_mean_weight_times_ln_2(tiny, tmp_path):
    weights = np.linspace(0.75, 1.25, 24)
    run = trainer(tiny, tmp_path, weights=weights, per_device_train_batch_size=24, max_steps=1)
    assert losses(run) == pytest.approx([weights.mean() * math.log(2)], abs=1e-5)
    event = run.state.log_history[0]
    assert event["weight"] == pytest.approx(1.0) and event["margin"] == pytest.approx(0, abs=1e-6)
    assert event["chosen_logp"] < 0 and {"text_accuracy", "visual_accuracy"} <= set(event)


def test_with_the_adapter_off_the_trained_model_is_the_one_before_training(tiny, tmp_path):
    run = trainer(tiny, tmp_path)
    batch = run.data_collator([run.train_dataset[number] for number in range(8)])
    batch = {key: batch[key] for key in batch if key not in ("weights", "visual")}
    policy = {"input_ids", "attention_mask", "pixel_values"}
    before = torch.cat(run.compute_ref_log_probs(run.model, batch))
    projector = {name: value.clone() for name, value in run.model.named_parameters() if "multi_modal_projector" in name}
    with torch.no_grad():
        untrained = run.model(**{key: batch[key] for key in policy}).logits
    run.train()
    after = torch.cat(run.compute_ref_log_probs(run.model, batch))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    with torch.no_grad():
        assert (run.model(**{key: batch[key] for key in policy}).logits - untrained).abs().max() > 1e-2
        with run.model.disable_adapter():
            torch.testing.assert_close(run.model(**{key: batch[key] for key in policy}).logits, untrained, atol=1e-6, rtol=0)
    moved = {name: not torch.equal(value, dict(run.model.named_parameters())[name]) for name, value in projector.items()}
    assert all(changed == ("modules_to_save" in name) for name, changed in moved.items()) and any(moved.values())


def test_lora_sits_on_the_language_model_only_and_the_projector_has_its_own_rate(tiny, tmp_path):
    run = trainer(tiny, tmp_path, projector_rate=2e-3, max_steps=1)
    names = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    assert not any("vision_tower" in name or "lm_head" in name for name in names)
    assert sum("lora_A" in name for name in names) == 2 * 7
    language, projector = run.create_optimizer().param_groups
    assert (language["lr"], projector["lr"]) == (1e-2, 2e-3)
    assert len(language["params"]) == 2 * 2 * 7 and len(projector["params"]) == 4
    frozen = trainer(tiny, tmp_path, projector_rate=0.0, max_steps=2)
    before = {name: value.clone() for name, value in frozen.model.named_parameters() if "modules_to_save" in name}
    frozen.train()
    assert all(torch.equal(value, dict(frozen.model.named_parameters())[name]) for name, value in before.items())


def test_sft_is_the_mean_negative_log_probability_of_the_chosen_tokens(tiny, tmp_path):
    stock = trainer(tiny, tmp_path, loss_type="sft", weights=np.linspace(0.5, 1.5, 24), max_steps=1,
                    per_device_train_batch_size=24)
    batch = stock.data_collator([stock.train_dataset[number] for number in range(24)])
    chosen = {key: batch[key][:24] for key in ("input_ids", "attention_mask", "pixel_values")}
    labels = batch["input_ids"][:24].masked_fill(batch["completion_mask"][:24] == 0, -100)
    with torch.no_grad():
        expected = LlavaForConditionalGeneration.from_pretrained(tiny["model"])(**chosen, labels=labels).loss
    assert losses(stock) == pytest.approx([expected.item()], abs=1e-5)


def test_validation_pairs_are_scored_in_the_same_terms(tiny, tmp_path):
    run = trainer(tiny, tmp_path, tiny["rows"][:16], evaluation=tiny["rows"][16:], eval_strategy="steps", eval_steps=2)
    run.precompute_reference()
    run.train()
    events = [event for event in run.state.log_history if "eval_loss" in event]
    assert [event["step"] for event in events] == [2, 4, 5]  # transformers looks once more at the end
    assert all(event["eval_chosen_logp"] < 0 and 0 <= event["eval_accuracy"] <= 1 for event in events)


def test_the_reference_cache_is_read_checked_and_extended(tiny, tmp_path, monkeypatch):
    def run(rows):
        made = trainer(tiny, tmp_path, rows)
        made.reference_cache, scored = tmp_path / "reference.json", []
        compute = made._reference_logps
        monkeypatch.setattr(made, "_reference_logps", lambda pairs: scored.append(len(pairs)) or compute(pairs))
        made.precompute_reference()
        return made, sum(scored)

    first, scored = run(tiny["rows"][:16])
    assert scored == 16
    second, scored = run(tiny["rows"])
    assert scored == 4 + 8, "four known pairs are checked, eight new ones computed"
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        assert second.train_dataset[column][:16] == first.train_dataset[column][:]
    wrong = {key: [value + 1 for value in pair] for key, pair in json.loads((tmp_path / "reference.json").read_text()).items()}
    (tmp_path / "reference.json").write_text(json.dumps(wrong))
    third, scored = run(tiny["rows"])
    assert scored == 4 + 24, "values of another model are not used"
    assert third.train_dataset["ref_chosen_logps"][:] == pytest.approx(second.train_dataset["ref_chosen_logps"][:], abs=1e-4)
    keys = pair_keys(first.train_dataset, 64)
    assert len(set(keys)) == 16 and keys == pair_keys(first.train_dataset, 64) != pair_keys(first.train_dataset, 63)

"""The shipped Med-LVLM and the functions around it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.lvlm import PHANTOM_WEIGHTS, generate, image_attention, load_lvlm, prompt
from mmedpo_utils.metrics import score_predictions
from mmedpo_utils.phantom.texts import questions
from mmedpo_utils.phantom.world import films

REPORT = (
    "The heart is normal in size. There is an opacity in the right upper zone. There is no "
    "effusion or nodule."
)


@pytest.fixture(scope="module")
def lvlm():
    return load_lvlm("phantom", "cpu")


@pytest.fixture(scope="module")
def asked():
    """Images, questions and rows of 40 test patients; reports left out."""
    population = films(40, 0, 420)
    pictures = {f"{film.film_id}.png": Image.fromarray(film.image) for film in population}
    rows = [
        row
        for row in questions(population, np.random.default_rng(0))
        if row["answer_type"] != "REPORT"
    ]
    return (
        [pictures[row["image"]] for row in rows],
        [row["text"].split("\n")[0] for row in rows],
        rows,
    )


def test_shipped_model_is_a_small_llava(lvlm):
    config = lvlm.model.config
    assert config.architectures == ["LlavaForConditionalGeneration"]
    assert (config.vision_config.model_type, config.text_config.model_type) == (
        "clip_vision_model",
        "mistral",
    )
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert 1.4e6 < sum(parameter.numel() for parameter in lvlm.model.parameters()) < 1.9e6
    assert sum(file.stat().st_size for file in PHANTOM_WEIGHTS.iterdir()) < 4e6
    assert not lvlm.model.training and lvlm.model.dtype == torch.float32


def test_prompt_is_the_chat_template(lvlm):
    expected = "<s>[INST] <image> Is there a nodule? [/INST]"
    assert prompt(lvlm.processor, "Is there a nodule?") == expected
    assert prompt(lvlm.processor, "Is there a nodule?\n<image>") == expected
    turns = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Is there a nodule?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    assert lvlm.processor.apply_chat_template(turns) == expected + " yes</s>"


def test_tokenizer_round_trip(lvlm):
    tokenizer = lvlm.processor.tokenizer
    assert tokenizer.decode(tokenizer(REPORT)["input_ids"]) == REPORT.lower()
    for answer in ("yes", "right upper", "pneumoperitoneum"):
        assert tokenizer.decode(tokenizer(answer)["input_ids"]) == answer
    assert tokenizer.decode(tokenizer("Is there free air?")["input_ids"]) == "is there <unk> <unk>?"


def test_vocabulary_covers_the_phantom_texts(lvlm):
    tokenizer = lvlm.processor.tokenizer
    for row in questions(films(60, 7), np.random.default_rng(0)):
        text = f"{row['text']} {row['gpt4_answer']}"
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


def test_embedded_prompt_gives_the_models_own_logits(lvlm, asked):
    from mmedpo_utils.lvlm import embed, image_features

    images, texts = asked[0][:3], [prompt(lvlm.processor, text) for text in asked[1][:3]]
    inputs = lvlm.processor(images=images, text=texts, padding=True, return_tensors="pt")
    features, index = image_features(lvlm, images, 2)
    embedded = embed(lvlm, texts, features[index])
    del embedded["image_mask"]
    with torch.no_grad():
        torch.testing.assert_close(
            lvlm.model(**embedded).logits[:, -1], lvlm.model(**inputs).logits[:, -1]
        )


def test_greedy_answers_do_not_depend_on_the_batch(lvlm, asked):
    images, texts, _ = asked
    together = generate(lvlm, images[:24], texts[:24], 4, 24)
    assert together == [generate(lvlm, [images[row]], [texts[row]], 4, 1)[0] for row in range(24)]


def test_a_bar_is_drawn_only_where_it_takes_long(lvlm, asked, monkeypatch, capsys):
    generate(lvlm, asked[0][:4], asked[1][:4], 1, 2)
    assert "".join(capsys.readouterr()) == ""
    monkeypatch.setattr("mmedpo_utils.lvlm.PROGRESS_SECONDS", 0)
    generate(lvlm, asked[0][:4], asked[1][:4], 1, 4)
    assert "".join(capsys.readouterr()) == "", "one batch needs no bar"
    generate(lvlm, asked[0][:4], asked[1][:4], 1, 2)
    assert "0/2" in capsys.readouterr().out


def test_samples_are_seeded_and_leave_the_random_state_alone(lvlm, asked):
    images, texts = asked[0][:6], asked[1][:6]
    state = torch.random.get_rng_state()
    first = generate(lvlm, images, texts, 4, 3, temperature=1.0, samples=5, seed=1)
    assert first == generate(lvlm, images, texts, 4, 3, temperature=1.0, samples=5, seed=1)
    assert first != generate(lvlm, images, texts, 4, 3, temperature=1.0, samples=5, seed=2)
    assert [len(answers) for answers in first] == [5] * 6
    assert torch.equal(state, torch.random.get_rng_state())


def test_real_question_and_a_wide_colour_image(lvlm):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 300, 3), dtype=np.uint8))
    answer = generate(lvlm, [image], ["What is under the right hemidiaphragm?"], 4, 1)
    assert isinstance(answer[0][0], str) and generate(lvlm, [], [], 4, 1) == []
    assert image_attention(lvlm, [image], ["Is this a normal x ray?"], 1).shape == (1, 8, 8)


def test_image_attention(lvlm, asked):
    maps = image_attention(lvlm, asked[0][:5], asked[1][:5], 2)
    assert maps.shape == (5, 8, 8) and maps.dtype == torch.float32 and (maps >= 0).all()
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(5))
    torch.testing.assert_close(maps, image_attention(lvlm, asked[0][:5], asked[1][:5], 5))
    assert lvlm.model.model.language_model.config._attn_implementation == "sdpa"


def test_shipped_model_is_misaligned(lvlm, asked):
    images, texts, rows = asked
    said = generate(lvlm, images, texts, 4, 64)
    table = [
        {**row, "answer": row["gpt4_answer"], "prediction": answer[0]}
        for row, answer in zip(rows, said, strict=True)
    ]
    scores = score_predictions(table)
    assert 50 < scores["closed_accuracy"]["score"] < 73 and 30 < scores["open_recall"]["score"] < 60
    card = json.loads((PHANTOM_WEIGHTS / "scores.json").read_text())
    assert 58 <= card["base"]["closed_accuracy"] <= 70 and 35 <= card["base"]["open_recall"] <= 60
    assert card["ceiling"]["closed_accuracy"] >= 90 and card["ceiling"]["open_recall"] >= 80
    premise = card["ceiling"]["premise"]
    assert premise["lesion_flips"] >= 60 and premise["elsewhere_flips"] <= 15


def test_model_card_quotes_the_scores():
    scores, text = (
        json.loads((PHANTOM_WEIGHTS / "scores.json").read_text()),
        (PHANTOM_WEIGHTS / "README.md").read_text(),
    )
    for name, label in (
        ("closed_accuracy", "closed accuracy"),
        ("open_recall", "open recall"),
        ("bleu", "report BLEU"),
    ):
        assert f"| {label} | {scores['base'][name]:.1f} | {scores['ceiling'][name]:.1f} |" in text


def test_adapter_is_loaded_and_in_force(lvlm, asked, tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    tuned = get_peft_model(load_lvlm("phantom", "cpu").model, lora)
    tuned.save_pretrained(tmp_path)
    adapted = load_lvlm("phantom", "cpu", adapter=tmp_path)
    torch.testing.assert_close(
        image_attention(adapted, asked[0][:2], asked[1][:2], 2).sum((1, 2)), torch.ones(2)
    )
    sample = lvlm.processor(
        images=asked[0][0], text=prompt(lvlm.processor, asked[1][0]), return_tensors="pt"
    )
    with torch.no_grad():
        before, after = lvlm.model(**sample).logits, adapted.model(**sample).logits
        assert not torch.allclose(before, after)
        with adapted.model.disable_adapter():
            torch.testing.assert_close(before, adapted.model(**sample).logits)


def test_wrong_input_gives_one_clear_error(lvlm, tmp_path):
    with pytest.raises(InputError, match="no readable model configuration"):
        load_lvlm(tmp_path / "absent", "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="expected 'llava'"):
        load_lvlm(tmp_path, "cpu")
    with pytest.raises(InputError, match="PEFT adapter folder"):
        load_lvlm("phantom", "cpu", adapter=tmp_path)
    with pytest.raises(InputError, match="'nf8' is not known"):
        load_lvlm("phantom", "cpu", quantization="nf8")
    with pytest.raises(InputError, match="1 images for 0 questions"):
        generate(lvlm, [Image.new("L", (8, 8))], [], 4, 1)
    with pytest.raises(InputError, match="would be the same"):
        generate(lvlm, [Image.new("L", (8, 8))], ["Is there a nodule?"], 4, 1, samples=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu():
    with pytest.raises(InputError, match="no GPU"):
        load_lvlm("phantom", "cuda")


def test_damaged_checkpoint(tmp_path):
    import shutil

    broken = shutil.copytree(PHANTOM_WEIGHTS, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(
        (PHANTOM_WEIGHTS / "model.safetensors").read_bytes()[:1000]
    )
    with pytest.raises(InputError, match="cut short"):
        load_lvlm(broken, "cpu")

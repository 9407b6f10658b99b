"""Conversion of the original LLaVA layout: parity with the authors' code, sharding, the two towers,
kills, errors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from trl.data_utils import apply_chat_template

from mmedpo_utils.base.chat_templates import TEMPLATES
from mmedpo_utils.base.errors import InputError
from mmedpo_utils.convert import llava_med
from mmedpo_utils.convert.llava_med import KNOWN_TOWERS
from mmedpo_utils.convert.llava_text import image_tokenizer
from mmedpo_utils.lvlm import MedLVLM, generate, load_lvlm, prompt
from mmedpo_utils.preference_rows import pair_row
from mmedpo_utils.trainer import preference_dataset

from .conftest import REPOSITORY
from .original_llava import (
    CLIP,
    CONFIG,
    TOWER,
    byte_tokenizer,
    random_state,
    write_original,
    write_tower,
)

pytestmark = pytest.mark.usefixtures("cache")


def inputs(lvlm: MedLVLM, image: Image.Image, case: dict) -> dict[str, torch.Tensor]:
    """Prompt and answer of a golden case through the chat template; pixels through the
    processor.
    """
    question = case["user"].removeprefix("<image>\n")
    text = apply_chat_template(
        {
            "prompt": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            ],
            "completion": [{"role": "assistant", "content": case["assistant"]}],
        },
        lvlm.processor,
    )
    assert text["prompt"] == prompt(lvlm.processor, question) == "<s>" + case["generation_prompt"]
    assert text["prompt"] + text["completion"] == "<s>" + case["full_prompt"]
    return lvlm.processor(
        images=image, text=text["prompt"] + text["completion"], return_tensors="pt"
    )


@pytest.mark.parametrize("vision_tower", ["checkpoint", "config"])
def test_golden_parity(golden, vision_tower):
    source, folder, expected, cases = golden
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the two towers are the same here
        lvlm = load_lvlm(source, "cpu", vision_tower=vision_tower)
    for name, case in cases.items():
        image = Image.open(folder / "images" / case["image"]).convert("RGB")
        batch = inputs(lvlm, image, case)
        torch.testing.assert_close(
            batch["pixel_values"],
            torch.from_numpy(expected[f"{name}_pixel_values"]),
            atol=1e-5,
            rtol=0,
        )
        ids, image_id = batch["input_ids"][0], lvlm.processor.image_token_id
        place = int((ids == image_id).nonzero()[0])
        spoken = ids[ids != image_id].tolist()
        assert spoken[:place] + [-200] + spoken[place:] == expected[f"{name}_input_ids"][0].tolist()
        with torch.no_grad():
            logits = lvlm.model(**batch).logits
        torch.testing.assert_close(
            logits, torch.from_numpy(expected[f"{name}_logits"]), atol=5e-5, rtol=0
        )
        labels = torch.from_numpy(expected[f"{name}_expanded_labels"])
        answer = labels[0, 1:] != -100
        assert torch.equal(ids[1:][answer], labels[0, 1:][answer])
        logps = logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[answer].sum()
        assert abs(float(logps) - float(expected[f"{name}_completion_logp"])) < 2e-4
        start = lvlm.processor(
            images=image, text="<s>" + case["generation_prompt"], return_tensors="pt"
        )
        greedy = lvlm.model.generate(**start, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert greedy[0, -8:].tolist() == expected[f"{name}_greedy8"].tolist()


def test_training_pairs_have_the_originals_tokens(golden):
    """Prompt and answers as the trainer tokenises them: together the ids of the authors' code, the
    answer's its labels.
    """
    source, folder, expected, cases = golden
    processor = load_lvlm(source, "cpu").processor
    rows = [
        pair_row(
            {
                "question_id": name,
                "image": case["image"],
                "text": case["user"],
                "gpt4_answer": case["assistant"],
            },
            "Maybe.",
            0.5,
        )
        for name, case in cases.items()
    ]
    for row in preference_dataset(
        rows, [1.0, 1.0], processor, folder / "images", folder / "images", 128
    ):
        name = next(name for name, case in cases.items() if row["image"].endswith(case["image"]))
        labels = expected[f"{name}_expanded_labels"][0]
        spoken = [
            token
            for token in row["prompt_ids"] + row["chosen_ids"]
            if token != processor.image_token_id
        ]
        assert spoken == [token for token in expected[f"{name}_input_ids"][0] if token != -200]
        assert row["chosen_ids"] == labels[labels != -100].tolist()
        assert len(row["prompt_ids"]) + len(row["chosen_ids"]) == len(labels)


@pytest.mark.parametrize("stem", ["00000001_000", "00027426_000", "synpic42202", "synpic32933"])
def test_golden_pixels(golden, shared, stem):
    source, folder, expected, _ = golden
    processor = load_lvlm(source, "cpu").processor
    image = Image.open(next((folder / "images").glob(f"{stem}.*")))
    kind = "rgb" if image.mode == "L" else "native"
    pixels = processor.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(
        pixels, torch.from_numpy(expected[f"pre_{stem}_{kind}_off0"]), atol=1e-5, rtol=0
    )
    if f"pre_{stem}_native_off1" in expected:
        assert (
            pixels - torch.from_numpy(expected[f"pre_{stem}_native_off1"])
        ).abs().max() > 1e-2, "one pixel off is seen"
    big = processor.image_processor(
        image.convert("RGB"),
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        return_tensors="pt",
    )["pixel_values"][0]
    torch.testing.assert_close(
        big[:, ::12, ::12], torch.from_numpy(expected[f"grid336_{stem}"]), atol=1e-5, rtol=0
    )


WRONG = {
    "tanh GELU in the projector": ("", "projector_hidden_act", "gelu_pytorch_tanh"),
    "RMSNorm epsilon": ("text_config", "rms_norm_eps", 1e-6),
    "GELU in the tower": ("vision_config", "hidden_act", "gelu"),
    "last layer": ("", "vision_feature_layer", -1),
    "rotary base": ("text_config", "rope_parameters", {"rope_theta": 1e4, "rope_type": "default"}),
}


@pytest.mark.parametrize("fault", WRONG, ids=list(WRONG))
def test_golden_parity_sees_wrong_wiring(golden, fault, cache):
    source, folder, expected, cases = golden
    lvlm = load_lvlm(source, "cpu")
    converted, (section, key, value) = (
        next(path for path in cache.iterdir() if path.is_dir()),
        WRONG[fault],
    )
    config = AutoConfig.from_pretrained(converted)
    setattr(getattr(config, section) if section else config, key, value)
    wrong = LlavaForConditionalGeneration.from_pretrained(
        converted, config=config, dtype=torch.float32
    ).eval()
    case = cases["case0"]
    batch = inputs(lvlm, Image.open(folder / "images" / case["image"]).convert("RGB"), case)
    with torch.no_grad():
        difference = (
            (wrong(**batch).logits - torch.from_numpy(expected["case0_logits"])).abs().max()
        )
    assert difference > 5e-4


def test_templates_are_the_published_strings(shared):
    strings = json.loads((shared / "golden" / "llavamed" / "prompt_template.json").read_text())
    question = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "Are the lungs normal?"}],
    }
    answer, why = {"role": "assistant", "content": "No"}, {"role": "user", "content": "Why?"}
    tokenizer = byte_tokenizer()

    def write(name, *turns):
        return tokenizer.apply_chat_template(
            list(turns), chat_template=TEMPLATES[name], tokenize=False
        )

    mistral, v1 = strings, strings["llava_med_copy_of_v1"]
    assert write("mistral_instruct", question, answer) == "<s>" + mistral["full"]
    assert write("mistral_instruct", question) == "<s>" + mistral["generation"]
    assert (
        write("mistral_instruct", question, answer, why) == "<s>" + mistral["two_turn_generation"]
    )
    assert write("v1", question, answer) == "<s>" + v1["full"]
    assert write("v1", question) == "<s>" + v1["generation"]
    blank = {"role": "assistant", "content": [{"type": "text", "text": " No"}]}
    assert (
        write("v1", question, blank)
        == "<s>" + strings["mmedpo_training_v1"]["full_with_leading_blank_answer"]
    )


@pytest.mark.parametrize(
    "model_template", [("phantom", "v1"), ("phantom", "mistral_instruct"), ("original", "v1")]
)
def test_template_of_choice_for_any_folder(original, model_template):
    name, template = model_template
    lvlm = load_lvlm(original if name == "original" else name, "cpu", template=template)
    turns = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Is there a nodule?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    start, whole = (
        prompt(lvlm.processor, "Is there a nodule?"),
        lvlm.processor.apply_chat_template(turns),
    )
    assert (
        start
        == "<s>"
        + {
            "v1": "A chat between a curious user and an artificial intelligence assistant. The "
            "assistant gives "
            "helpful, detailed, and polite answers to the user's questions. USER: <image>\nIs "
            "there a nodule? "
            "ASSISTANT:",
            "mistral_instruct": "[INST] <image>\nIs there a nodule? [/INST]",
        }[template]
    )
    ids = [
        lvlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (start, whole)
    ]
    assert ids[1][: len(ids[0])] == ids[0] and ids[1][-1] == lvlm.processor.tokenizer.eos_token_id
    with pytest.raises(InputError, match="lvlm.template: 'v2'"):
        load_lvlm("phantom", "cpu", template="v2")


@pytest.mark.parametrize(
    "layout",
    [
        ("safetensors", 1, True),
        ("safetensors", 3, False),
        ("bin", 1, True),
        ("bin", 3, True),
        ("bin", 2, False),
    ],
    ids=str,
)
def test_shards_of_every_kind_give_the_same_model(tmp_path, state, layout, cache):
    kind, shards, index = layout
    write_tower(tmp_path / "clip", CLIP, state)
    stored = state | {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)
    }
    source = write_original(tmp_path / "original", CONFIG, stored, shards, kind, index)
    model = load_lvlm(source, "cpu").model
    torch.testing.assert_close(model.lm_head.weight, state["lm_head.weight"], rtol=0, atol=0)
    projector = model.model.multi_modal_projector
    torch.testing.assert_close(
        projector.linear_2.weight, state["model.mm_projector.2.weight"], rtol=0, atol=0
    )
    total = sum(parameter.double().sum() for parameter in model.parameters())
    torch.testing.assert_close(total, sum(tensor.double().sum() for tensor in state.values()))
    folder = next(path for path in cache.iterdir() if path.is_dir())
    assert len(list(folder.glob("*.safetensors"))) == shards
    record = json.loads((folder / "conversion.json").read_text())["values"]
    assert (
        record["source"] == str(source)
        and record["vision_tower"] == "checkpoint"
        and record["template"] == "mistral_instruct"
    )
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in folder.iterdir()), (
        "others may read it"
    )


def test_an_old_torch_file_is_read_too(tmp_path, state):
    write_tower(tmp_path / "clip", CLIP, state)
    source = write_original(tmp_path / "original", CONFIG, state, 1, "bin")
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(
        load_lvlm(source, "cpu").model.lm_head.weight, state["lm_head.weight"]
    )


def test_the_two_towers(tmp_path, state):
    other = {
        name: value + 0.5 if name.endswith("fc1.bias") else value for name, value in state.items()
    }
    write_tower(tmp_path / "clip", CLIP, other)
    source = write_original(tmp_path / "original", CONFIG, state, 2)
    for choice, weights in (("checkpoint", state), ("config", other), ("checkpoint", state)):
        with pytest.warns(
            UserWarning, match=r"differs from clip in 3 of \d+ tensors \(largest difference 0.5\)"
        ):
            tower = load_lvlm(source, "cpu", vision_tower=choice).model.model.vision_tower
        torch.testing.assert_close(
            tower.encoder.layers[1].mlp.fc1.bias, weights[f"{TOWER}encoder.layers.1.mlp.fc1.bias"]
        )


@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPModel])
def test_a_tower_as_transformers_saves_it(tmp_path, state, kind):
    vision = {key: value for key, value in CLIP.items() if key != "model_type"}
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    model = kind(
        CLIPVisionConfig(**vision)
        if kind is CLIPVisionModel
        else CLIPConfig(text_config=text, vision_config=vision)
    )
    model.save_pretrained(tmp_path / "clip")
    own = getattr(model, "vision_model", model).state_dict()
    source = write_original(tmp_path / "original", CONFIG, state)
    with pytest.warns(UserWarning, match="differs from clip"):
        tower = load_lvlm(
            source, "cpu", vision_tower="config"
        ).model.model.vision_tower.state_dict()
    assert tower.keys() == own.keys() and all(torch.equal(tower[name], own[name]) for name in own)


def test_a_checkpoint_without_a_tower(tmp_path, state):
    write_tower(tmp_path / "clip", CLIP, state)
    bare = {name: tensor for name, tensor in state.items() if not name.startswith(TOWER)}
    source = write_original(tmp_path / "original", CONFIG, bare)
    with pytest.raises(
        InputError, match="holds no vision tower .* set lvlm.vision_tower to config"
    ):
        load_lvlm(source, "cpu")
    tower = load_lvlm(source, "cpu", vision_tower="config").model.model.vision_tower
    torch.testing.assert_close(tower.pre_layrnorm.weight, state[f"{TOWER}pre_layrnorm.weight"])


def test_the_known_tower_needs_no_network(tmp_path, state, monkeypatch):
    name = "openai/clip-vit-large-patch14-336"
    monkeypatch.setitem(KNOWN_TOWERS, name, {key: CLIP[key] for key in CLIP if key != "model_type"})
    source = write_original(tmp_path / "original", CONFIG | {"mm_vision_tower": name}, state)
    assert load_lvlm(source, "cpu").model.config.vision_config.hidden_size == 16
    (tmp_path / "partly").mkdir()
    monkeypatch.setattr(
        llava_med, "snapshot_download", lambda name, **others: str(tmp_path / "partly")
    )
    assert load_lvlm(source, "cpu").model.config.vision_config.hidden_size == 16, (
        "where the cache has no configuration of it"
    )
    monkeypatch.undo()
    with pytest.raises(
        InputError,
        match="mm_vision_tower.*not to be had from the Hub.*lvlm.vision_tower to checkpoint",
    ):
        load_lvlm(source, "cpu", vision_tower="config")


@pytest.mark.parametrize("model_type", ["llava_llama", "llava"])
def test_a_llama_backbone_with_a_full_vocabulary(tmp_path, model_type):
    """LLaMA 3's shapes: grouped keys, another head size than Mistral's, a reserved token for the
    image.
    """
    config = CONFIG | {
        "model_type": model_type,
        "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": 5e5,
        "vocab_size": 260,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }
    state = random_state(config, CLIP)
    write_tower(tmp_path / "clip", CLIP, state)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_0|>"]})
    lvlm = load_lvlm(
        write_original(tmp_path / "original", config, state, 2, tokenizer=tokenizer), "cpu"
    )
    text = lvlm.model.config.text_config
    assert (
        text.model_type == "llama"
        and lvlm.processor.image_token_id == 259
        and text.vocab_size == 260
    )
    assert text.rope_parameters["rope_theta"] == 5e5 and text.rope_parameters["factor"] == 8.0
    assert prompt(lvlm.processor, "Why?").startswith("<s>A chat between a curious user")
    shapes = {name: tensor.shape for name, tensor in lvlm.model.state_dict().items()}
    assert shapes["model.language_model.layers.1.self_attn.k_proj.weight"] == (16, 32) and shapes[
        "lm_head.weight"
    ] == (260, 32)
    assert generate(lvlm, [Image.new("RGB", (40, 30))], ["Is it?"], 3, 1)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """What Mistral's tokenizer is made of: pieces with a blank mark, bytes to fall back to, no free
    id, unk as pad.
    """
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "N",
        "o",
        "I",
        "s",
        "i",
        "t",
        "?",
        "[",
        "]",
        "/",
        "T",
        "▁No",
        "No",
        "▁[",
        "▁i",
        "▁is",
        "it",
    ]
    merges = [("N", "o"), ("▁", "No"), ("▁", "["), ("▁", "i"), ("▁i", "s"), ("i", "t")]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in pieces[:3]]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )


def test_an_image_token_in_a_full_vocabulary(tmp_path):
    """It takes the unknown token's id, which no text produces, and each stretch of text begins as
    the original code's does.
    """
    old = sentencepiece_like()
    old.save_pretrained(tmp_path)
    new = image_tokenizer(tmp_path, len(old))
    new.save_pretrained(tmp_path / "new")
    new = PreTrainedTokenizerFast.from_pretrained(tmp_path / "new")
    assert (
        len(new) == len(old)
        and new.convert_tokens_to_ids("<image>") == 0
        and new.pad_token == "</s>"
    )

    def pieces(text, tokenizer=old):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    stretches = ["[INST] ", "\nis it é? [/INST] No"]
    expected = [1, *pieces(stretches[0]), 0, *pieces(stretches[1]), 2]
    assert pieces("<s>" + "<image>".join(stretches) + "</s>", new) == expected
    assert pieces(" No</s>", new) == expected[-2:], "an answer by itself is the end of the whole"
    assert new.decode(pieces("is it No?", new)).strip() == "is it No?"
    plain = json.loads((tmp_path / "tokenizer.json").read_text())
    plain["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(InputError, match="no id is free for <image>"):
        image_tokenizer(tmp_path, len(old))


def test_the_converted_folder_is_used_again_until_the_source_changes(original, state, cache):
    load_lvlm(original, "cpu")
    folder = next(path for path in cache.iterdir() if path.is_dir())
    first = folder.stat().st_ino
    load_lvlm(original, "cpu")
    assert folder.stat().st_ino == first
    assert load_lvlm(folder, "cpu").model.config.image_token_id == 259, (
        "it is a plain Hugging Face folder"
    )
    file = original / "model-00001-of-00002.safetensors"
    save_file(
        load_file(file) | {"lm_head.weight": state["lm_head.weight"] + 1}, file, {"format": "pt"}
    )
    torch.testing.assert_close(
        load_lvlm(original, "cpu").model.lm_head.weight, state["lm_head.weight"] + 1
    )
    assert folder.stat().st_ino != first
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"], (
        "one folder and its lock"
    )


def test_processes_that_ask_together_wait_for_one_conversion(original, cache, capfd):
    children = []
    for _ in range(3):
        children.append(os.fork())
        if not children[-1]:
            load_lvlm(original, "cpu")
            sys.stdout.flush()
            os._exit(0)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert capfd.readouterr().out.count("converting") == 1
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_hub_repository(tmp_path, state, kind, monkeypatch, cache):
    write_tower(tmp_path / "clip", CLIP, state)
    stored = write_original(tmp_path / "stored", CONFIG, state, 2, kind)

    def download(name, allow_patterns, local_files_only):
        assert name == "team/llava" and not local_files_only
        (tmp_path / "hub").mkdir(exist_ok=True)
        for file in stored.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, tmp_path / "hub")
        return str(tmp_path / "hub")

    monkeypatch.setattr(llava_med, "snapshot_download", download)
    torch.testing.assert_close(
        load_lvlm("team/llava", "cpu").model.lm_head.weight, state["lm_head.weight"]
    )
    folder = next(path for path in cache.iterdir() if path.is_dir())
    assert folder.name.startswith("llava-checkpoint-")
    assert json.loads((folder / "conversion.json").read_text())["values"]["source"] == "team/llava"


DAMAGE = {
    "missing tensor": (
        lambda state: state.pop("model.norm.weight"),
        r"1 missing \(model.norm.weight\)",
    ),
    "left-over tensor": (
        lambda state: state.update({"model.image_newline": torch.ones(2)}),
        r"1 unexpected \(model.image_newline\)",
    ),
    "another shape": (
        lambda state: state.update({"model.norm.weight": torch.ones(3)}),
        r"model.norm.weight \[3\] instead of",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_tensors_are_named(tmp_path, state, damage, cache):
    change, message = DAMAGE[damage]
    change(state)
    write_tower(tmp_path / "clip", CLIP, state)
    source = write_original(tmp_path / "original", CONFIG, state, 2)
    with pytest.raises(InputError, match=message):
        load_lvlm(source, "cpu")
    assert not [path for path in cache.iterdir() if path.is_dir()]


SETTINGS = {
    "mm_projector_type": "linear",
    "mm_use_im_start_end": True,
    "image_aspect_ratio": "anyres",
    "hidden_size": "wide",
}


@pytest.mark.parametrize("key", SETTINGS)
def test_other_settings_are_refused(tmp_path, state, key):
    write_tower(tmp_path / "clip", CLIP, state)
    source = write_original(tmp_path / "original", CONFIG | {key: SETTINGS[key]}, state)
    with pytest.raises(
        InputError, match=r"config.json: .*(expected|is not a mistral configuration)"
    ):
        load_lvlm(source, "cpu")


def test_damaged_files(original, monkeypatch):
    shard = original / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match="00002.safetensors: cannot be read as weights"):
        load_lvlm(original, "cpu")
    shard.unlink()
    with pytest.raises(
        InputError,
        match="00002.safetensors: no such file, though model.safetensors.index.json names it",
    ):
        load_lvlm(original, "cpu")
    with pytest.raises(InputError, match="lvlm.vision_tower: 'own' is not known"):
        load_lvlm(original, "cpu", vision_tower="own")
    with pytest.raises(InputError, match="not to be had from the Hub.*hf download"):
        load_lvlm("microsoft/llava-med-v1.5-mistral-7b", "cpu")


def test_a_torch_file_cannot_run_code(tmp_path, state):
    write_tower(tmp_path / "clip", CLIP, state)
    source = write_original(tmp_path / "original", CONFIG, state, 1, "bin")
    torch.save({"lm_head.weight": Danger(str(tmp_path / "ran"))}, source / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_lvlm(source, "cpu")
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": state}, source / "pytorch_model.bin")
    with pytest.raises(
        InputError, match="pytorch_model.bin: .*expected a dictionary of tensors by name"
    ):
        load_lvlm(source, "cpu")
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load_lvlm(source, "cpu")


class Danger:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_no_room_on_the_disk(original, monkeypatch, cache):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(InputError, match="0.0 GB are free.*set HF_HOME"):
        load_lvlm(original, "cpu")
    assert not [path for path in cache.iterdir() if path.is_dir()]
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HOME", str(original / "config.json"))
    with pytest.raises(InputError, match="cannot be written"):
        load_lvlm(original, "cpu")


STEPS = [
    ("save_file", 1),
    ("save_file", 2),
    ("write_json", 1),
    ("write_sealed", 1),
    ("rename", 1),
    ("rename", 2),
]


@pytest.mark.parametrize("again", [False, True], ids=["first time", "over an earlier one"])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_killed_at_any_step_nothing_half_written_loads(original, step, again, cache, monkeypatch):
    """A process that is killed before, or halfway through, the n-th write leaves no folder that
    loads as this model.
    """
    if again:
        load_lvlm(original, "cpu")
        monkeypatch.setattr(llava_med, "LAYOUT", 99)
    killed = os.fork()
    if not killed:
        kill_at(*step)
        load_lvlm(original, "cpu")
        os._exit(0)
    status = os.waitpid(killed, 0)[1]
    if step == ("rename", 2) and not again:
        assert os.WEXITSTATUS(status) == 0, "one rename is enough the first time"
    else:
        assert os.WTERMSIG(status) == signal.SIGKILL
    for folder in [path for path in cache.iterdir() if path.is_dir()]:
        if not folder.name.startswith(".") or (folder / "config.json").is_file():
            assert (
                len(load_file(sorted(folder.glob("*.safetensors"))[-1]))
                and (folder / "conversion.json").is_file()
            )
            load_lvlm(folder, "cpu")
        else:
            with pytest.raises(InputError):
                load_lvlm(folder, "cpu")
    model = load_lvlm(original, "cpu").model
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def kill_at(name: str, count: int) -> None:
    """Have this process killed at the ``count``-th call of a function that writes; a weight file is
    half written by then.
    """
    owner = Path if name == "rename" else llava_med
    usual, calls = getattr(owner, name), []

    def counted(*arguments, **others):
        calls.append(1)
        if len(calls) == count:
            if name == "save_file":
                usual(*arguments, **others)
                os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(*arguments, **others)

    setattr(owner, name, counted)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A random checkpoint of about 200 MB in four shards."""
    config = CONFIG | {
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 15,
        "num_attention_heads": 8,
    }
    clip = CLIP | {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    folder, state = tmp_path_factory.mktemp("large"), random_state(config, clip)
    write_tower(folder / "clip", clip, state)
    write_original(folder / "original", config, state, 4)
    assert (
        190e6
        < sum(file.stat().st_size for file in (folder / "original").glob("*.safetensors"))
        < 230e6
    )
    return folder / "original"


@pytest.fixture(scope="module")
def whole(large, tmp_path_factory) -> tuple[dict[str, str], float]:
    """An uninterrupted conversion: its shards' digests, and its peak memory over the interpreter's
    in MB.
    """
    home, peaks = tmp_path_factory.mktemp("whole"), []
    for convert in (False, True):
        with convert_process(large, home, convert) as process:
            peaks.append(int(process.stdout.read().split()[-1]) / 1e3)
    return digests(home), peaks[1] - peaks[0]


def convert_process(source: Path, home: Path, convert: bool = True) -> subprocess.Popen:
    """A process that converts, or imports the same and does nothing, and prints its peak memory in
    kB.
    """
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom mmedpo_utils.convert.llava_med import "
        "converted, original_config\n"
        "source = Path(sys.argv[1])\n"
        + "converted(source, original_config(source), 'checkpoint', str(source))\n" * convert
        + "print(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(source)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"},
    )


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*.safetensors")
    }


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc"
)
def test_a_large_checkpoint_needs_little_memory(whole):
    print(f"peak memory over the interpreter's: {whole[1]:.0f} MB")
    assert len(whole[0]) == 4 and whole[1] < 600


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_large_conversion_killed_at_any_moment(large, whole, tmp_path, moment, cache, capsys):
    """``moment`` is the share of the weights that is written when the process is killed."""
    total = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    with convert_process(large, tmp_path / "cache") as process:
        deadline = time.monotonic() + 120
        while (
            not (folders := [path for path in cache.glob("*") if path.is_dir()])
            or moment > written(folders[0]) / total
        ):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    folders = [path for path in cache.iterdir() if path.is_dir()]
    if moment > 0.5 and not folders[0].name.startswith("."):
        assert digests(cache) == whole[0]
        pytest.skip("the conversion was done before the kill: this machine is too busy")
    assert [folder.name.startswith(".") for folder in folders] == [True]
    with pytest.raises(InputError):
        load_lvlm(folders[0], "cpu")
    load_lvlm(large, "cpu")
    assert "converting" in capsys.readouterr().out and digests(cache) == whole[0]


def written(folder: Path) -> int:
    """Bytes of weights in a folder that another process writes to."""
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_blocks * 512 for file in folder.glob("*.safetensors"))
    return 0

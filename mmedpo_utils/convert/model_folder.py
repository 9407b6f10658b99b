"""The door for Med-LVLMs: whatever a profile names becomes a Hugging Face folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor
from transformers.integrations import is_deepspeed_zero3_enabled

from ..base.chat_templates import TEMPLATES
from ..base.errors import InputError, first_line
from ..base.files import load_object
from ..base.quiet import quiet_loading
from ..lvlm import PHANTOM_WEIGHTS, MedLVLM, image_token_count, load_lvlm, load_weights, prompt
from .adapters import adapter_folder, adapter_record
from .llava_med import cache_folder, cached, converted, fetch, folder_record, original_config


def model_folder(
    name_or_path: str | Path, vision_tower: str, base_adapter: str | Path | None = None
) -> Path:
    """The Hugging Face folder to load a Med-LVLM from.

    A model in the original layout is converted first, one on the Hub fetched. With ``base_adapter``
    the two are merged; the merged folder is kept beside the converted ones, and used again as long
    as its model and its adapter are the same files.

    Raises:
        InputError: as `load_lvlm`, or no room on the disk.
    """
    source = _hugging_face_folder(name_or_path, vision_tower)
    if base_adapter is None:
        return source
    adapter = adapter_folder(base_adapter)
    record = {"model": folder_record(source), "adapter": adapter_record(adapter)}
    name = f"{Path(name_or_path).name}-with-{Path(base_adapter).name}"

    def write(draft: Path) -> None:
        save_merged(load_lvlm(name_or_path, "auto", adapter, vision_tower=vision_tower), draft)

    target = cache_folder(name, f"{source} {adapter.resolve()}")
    cached(target, record, write)
    return target


def save_merged(lvlm: MedLVLM, folder: Path) -> None:
    """Write a model with its adapter merged, and its processor, into ``folder``. Raises OSError: no
    room.
    """
    with quiet_loading():
        lvlm.model.merge_and_unload().save_pretrained(folder, max_shard_size="5GB")
        lvlm.processor.save_pretrained(folder)


def _hugging_face_folder(name_or_path: str | Path, vision_tower: str) -> Path:
    """The folder to load from: an original checkpoint is converted first, a Hub repository
    fetched.
    """
    source = PHANTOM_WEIGHTS if str(name_or_path) == "phantom" else Path(name_or_path)
    if not source.is_dir():
        source = fetch(str(name_or_path))
    original = original_config(source)
    if original is not None:
        with quiet_loading():
            source = converted(source, original, vision_tower, str(name_or_path))
    read_config(source)  # raises where it is no LLaVA
    return source


def prepared_processor(source: Path, config: Any, template: str | None) -> LlavaProcessor:
    """The processor of a Hugging Face LLaVA folder, with which its model finds the image.

    Raises:
        InputError: as `read_processor` and `prepare_processor`.
    """
    processor = read_processor(source)
    prepare_processor(source, config, processor, template)
    return processor


def read_processor(source: Path) -> LlavaProcessor:
    """The processor of a Hugging Face LLaVA folder. Raises InputError: unreadable, or of another
    kind.
    """
    try:
        with quiet_loading():
            # The torchvision back end resizes otherwise than Pillow, which the original code uses.
            processor = AutoProcessor.from_pretrained(
                source, backend="pil", trust_remote_code=False
            )
    except Exception as error:  # on settings of a wrong type libraries raise whatever they meet
        raise InputError(
            f"{source}: its processor cannot be read ({first_line(error)}); the folder needs "
            "processor_config.json and the files of its image processor and tokenizer"
        ) from error
    if not isinstance(processor, LlavaProcessor):
        raise InputError(
            f"{source}: its processor is a {type(processor).__name__}; expected a LlavaProcessor: "
            "put the processor_config.json of a LLaVA model there"
        )
    processor.tokenizer.padding_side = "left"
    return processor


def prepare_processor(
    source: Path, config: Any, processor: LlavaProcessor, template: str | None
) -> int:
    """Make a processor write prompts in which the model finds the image, or refuse.

    Values that its file leaves out come from the model's configuration. Then one question about one
    image is written: a template that drops the image, or another image token than the model's,
    would have every question answered from its text alone.

    Args:
        config: the model's `LlavaConfig`.
        template: a name in `chat_templates.TEMPLATES`; None is the folder's own chat template.

    Returns:
        how many tokens an image becomes.

    Raises:
        InputError: names the file and the key.
    """
    if template is not None:
        processor.chat_template = TEMPLATES[template]
    if processor.tokenizer.pad_token_id is None:
        raise InputError(
            f"{source / 'tokenizer_config.json'}: `pad_token` is missing, with which shorter "
            "questions are filled up; name a token there that no text produces"
        )
    tokens = _complete_processor(source, config, processor)
    mark, found = processor.image_token, config.image_token_id
    own = processor.tokenizer.convert_tokens_to_ids(mark)
    if own != found:
        raise InputError(
            f"{source / 'config.json'}: `image_token_index` is {found}, and the tokenizer's {mark} "
            f"is {own}; expected the same number: the model would answer without seeing the image"
        )
    try:
        written = prompt(processor, "Is there a nodule?")
        count = image_token_count(processor)
    except Exception as error:  # a template is a program of its own: anything may come out of it
        raise InputError(
            f"{source}: its processor or chat template cannot write a prompt "
            f"({first_line(error)}); correct its files, or set lvlm.template"
        ) from error
    if written.count(mark) != 1:
        raise InputError(
            f"{source}: the chat template writes {written.count(mark)} {mark} marks for a question "
            "about one image, and expected is one: the model would answer without the image; "
            "correct chat_template.jinja, or set lvlm.template"
        )
    if count != tokens:
        raise InputError(
            f"{source}: its processor makes {count} tokens of an image, and config.json's vision "
            f"tower {tokens}; correct the size of the images in processor_config.json or "
            "preprocessor_config.json"
        )
    return tokens


def _complete_processor(source: Path, config: Any, processor: LlavaProcessor) -> int:
    """Set what the processor's file leaves out, compare what it says; how many tokens an image
    is.
    """
    tower = config.vision_config
    expected = {
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        # CLIP puts a class token before its patches; SigLIP, for instance, has none.
        "num_additional_image_tokens": int("clip" in tower.model_type),
    }
    file = source / "processor_config.json"
    stored = load_object(file, "the settings of a processor") if file.is_file() else {}
    for key, value in expected.items():
        if stored.get(key) is None:
            setattr(processor, key, value)
        elif stored[key] != value:
            raise InputError(
                f"{file}: `{key}` is {stored[key]!r}, and config.json's model needs {value!r}; "
                "correct it, or take the key out"
            )
    patches = (tower.image_size // tower.patch_size) ** 2
    drops_class_token = config.vision_feature_select_strategy == "default"
    return patches + (0 if drops_class_token else expected["num_additional_image_tokens"])


def read_config(source: Path) -> Any:
    """The `LlavaConfig` of a Hugging Face folder. Raises InputError: unreadable, or of another
    architecture.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # on settings of a wrong type libraries raise whatever they meet
        raise InputError(
            f"{source}: no readable model configuration ({first_line(error)}); expected "
            '"phantom", a '
            "folder with a LLaVA config.json, or a model's name on the Hub"
        ) from error
    if config.model_type != "llava":
        raise InputError(
            f"{source}: config.json says model_type {config.model_type!r}; expected 'llava' "
            "(LlavaForConditionalGeneration)"
        )
    # A training has compared them before it switched ZeRO stage 3 on, which divides what is built.
    if not is_deepspeed_zero3_enabled():
        _refuse_absurd(source, config)
    return config


MOST_LAYERS = 1_000


def _refuse_absurd(source: Path, config: Any) -> None:
    """Compare the network that a configuration describes with the size of its files, before
    anything of that size is allocated.

    Raises:
        InputError: no network can be made of it, or one of many more weights than the files hold.
    """
    try:
        layers = [part.num_hidden_layers for part in (config.text_config, config.vision_config)]
        if not all(0 < count <= MOST_LAYERS for count in layers):
            raise ValueError(f"{max(layers):.3g} layers, and at most {MOST_LAYERS} are loaded")
        with torch.device("meta"), quiet_loading():
            model = LlavaForConditionalGeneration(copy.deepcopy(config))
        weights = sum(parameter.numel() for parameter in model.parameters())
    except Exception as error:  # a value that no network can have fails wherever it is used
        raise InputError(
            f"{source / 'config.json'}: its values make no network ({first_line(error)}); fetch "
            "the file again"
        ) from error
    files = [*source.glob("*.safetensors"), *source.glob("*.bin")]
    held = sum(file.stat().st_size for file in files)
    # Two weights a byte are as many as 4 bits hold; tied ones are counted once more.
    if held and weights > 4 * held:
        raise InputError(
            f"{source / 'config.json'}: describes a network of {weights:,} weights, and the "
            f"folder's files hold {held:,} bytes; the two do not belong together, or the files are "
            "cut short: fetch the folder again"
        )


def empty_model(source: Path) -> LlavaForConditionalGeneration:
    """The model of a Hugging Face folder on the meta device: names and shapes, and no weights.

    Raises:
        InputError: as `load_lvlm` would, for the weights.
    """
    return load_weights(source, device_map={"": "meta"})

"""The Med-LVLM: load it, write its prompt, generate answers in batches, read its attention to the
image.

Two layouts work: a Hugging Face folder of a `LlavaForConditionalGeneration`, and the original one,
in which LLaVA-Med 1.5 is published (arXiv 2412.06141, Section 5.1: CLIP vision tower, two-layer
projector, Mistral). The latter is converted on first use. "phantom" is the small model shipped with
the package. In 4 bits, on a GPU or the CPU, the language model's linear layers are quantised;
vision tower, projector and output layer keep their precision.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

from .base.chat_templates import TEMPLATES
from .base.doors import open_door
from .base.environment import check_device
from .base.errors import InputError, first_line
from .base.files import load_json
from .profiles import Profile

PHANTOM_WEIGHTS = Path(__file__).parent / "phantom" / "weights" / "lvlm"
QUANTIZATIONS = ("none", "nf4")
VISION_TOWERS = ("checkpoint", "config")
PROGRESS_SECONDS = 30


@dataclass(frozen=True)
class MedLVLM:
    """A loaded Med-LVLM.

    Attributes:
        model: `LlavaForConditionalGeneration`, or the `PeftModel` around it where an adapter was
            loaded; in eval mode.
        processor: its `LlavaProcessor`: image processor, tokenizer and chat template.
        device: where the model is.
    """

    model: Any
    processor: Any
    device: torch.device

    @property
    def llava(self) -> LlavaForConditionalGeneration:
        """The LLaVA model itself; an adapter's layers stay in force inside it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model


def load_lvlm(
    name_or_path: str | Path,
    device: str = "auto",
    adapter: str | Path | None = None,
    quantization: str = "none",
    vision_tower: str = "checkpoint",
    template: str | None = None,
    base_adapter: str | Path | None = None,
) -> MedLVLM:
    """Load a Med-LVLM for inference or as the start of training.

    Args:
        name_or_path: "phantom", a folder in the Hugging Face or the original LLaVA layout, or a
            model's name on the Hub.
        device: auto | cpu | cuda. The CPU runs in float32, a GPU in bfloat16.
        adapter: a LoRA adapter to put on top, in PEFT's or LLaVA's layout
            (`adapters.adapter_folder`).
        quantization: none | nf4 (4 bits through bitsandbytes).
        vision_tower: checkpoint | config: in the original layout, the tower's weights inside the
            checkpoint or those that its configuration names. A Hugging Face folder has one tower,
            and this has no effect.
        template: a name in `llava_text.TEMPLATES`; None is the folder's own chat template.
        base_adapter: an adapter that is merged into the model before all else, as `model_folder`
            does.

    Raises:
        InputError: no such folder, another architecture, tensors left over or missing, no GPU where
            one is asked for, an adapter that does not fit, or a processor or template with which
            the model would not see the image.
    """
    target = torch.device(check_device(device))
    for key, value, known in (
        ("quantization", quantization, QUANTIZATIONS),
        ("vision_tower", vision_tower, VISION_TOWERS),
        ("template", template, (None, *TEMPLATES)),
    ):
        if value not in known:
            raise InputError(f"lvlm.{key}: {value!r} is not known; expected one of {known}")
    source = open_door("Med-LVLM")(name_or_path, vision_tower, base_adapter)
    model, processor = _read_folder(source, target, quantization)
    prepare_processor(source, model.config, processor, template)
    if adapter is not None:
        model = open_door("adapter")(model, adapter, (str(name_or_path), source.name))
    return MedLVLM(model.eval(), processor, target)


def _read_folder(
    source: Path, target: torch.device, quantization: str
) -> tuple[LlavaForConditionalGeneration, Any]:
    """Model and processor of a Hugging Face folder, the model on ``target``."""
    precision = torch.float32 if target.type == "cpu" else torch.bfloat16
    small = quantization == "nf4"
    options: dict[str, Any] = {"dtype": precision}
    try:
        if small:
            options |= {"device_map": {"": target}, "quantization_config": nf4_config(precision)}
        model = _load_weights(source, **options)
    except ImportError as error:
        raise InputError(
            f"lvlm.quantization: {quantization}: a library is missing ({first_line(error)}); "
            "install the package's extra `gpu`, or set lvlm.quantization to none"
        ) from error
    if small:
        _keep_packing(model)
    # bitsandbytes or DeepSpeed has put the weights where they belong.
    placed = small or is_deepspeed_zero3_enabled()
    return (model if placed else model.to(target)), read_processor(source)


def _load_weights(source: Path, **options: Any) -> LlavaForConditionalGeneration:
    """transformers' own loading, with each tensor of the folder in its place.

    Raises:
        InputError: unreadable, or tensors are missing or left over, of which transformers only
            warns.
    """
    with quiet_loading():
        try:
            model, info = LlavaForConditionalGeneration.from_pretrained(
                source, trust_remote_code=False, output_loading_info=True, **options
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise InputError(
                f"{source}: cannot be loaded as a LLaVA model ({first_line(error)}); the folder "
                "needs config.json, model.safetensors and the processor's files"
            ) from error
    for kind, meaning in (("missing_keys", "missing"), ("unexpected_keys", "left over")):
        if info[kind]:
            names = sorted(info[kind])
            raise InputError(
                f"{source}: {len(names)} weights are {meaning}, e.g. {names[0]}; the checkpoint is "
                "incomplete or of another architecture"
            )
    return model


def empty_model(source: Path) -> LlavaForConditionalGeneration:
    """The model of a Hugging Face folder on the meta device: names and shapes, and no weights.

    Raises:
        InputError: as `load_lvlm` would, for the weights.
    """
    return _load_weights(source, device_map={"": "meta"})


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
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, ImportError) as error:
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


def image_token_count(processor: ProcessorMixin) -> int:
    """How many image tokens one ``<image>`` mark becomes."""
    batch = processor(
        images=Image.new("RGB", (64, 64)), text=processor.image_token, return_tensors="pt"
    )
    return int((batch["input_ids"] == processor.image_token_id).sum())


def prepare_processor(
    source: Path, config: Any, processor: LlavaProcessor, template: str | None
) -> int:
    """Make a processor write prompts in which the model finds the image, or refuse.

    Values that its file leaves out come from the model's configuration. Then one question about one
    image is written: a template that drops the image, or another image token than the model's,
    would have every question answered from its text alone.

    Args:
        config: the model's `LlavaConfig`.
        template: a name in `llava_text.TEMPLATES`; None is the folder's own chat template.

    Returns:
        how many tokens an image becomes.

    Raises:
        InputError: names the file and the key.
    """
    if template is not None:
        processor.chat_template = TEMPLATES[template]
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
    stored = load_json(file, "the settings of a processor") if file.is_file() else {}
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


def load_profile_lvlm(
    profile: Profile,
    adapter: str | Path | None = None,
    device: str | None = None,
    template: str | None = None,
) -> MedLVLM:
    """The Med-LVLM that a profile's section ``lvlm`` describes (see `load_lvlm`).

    ``device`` and ``template`` replace the profile's.
    """
    values = profile.lvlm
    return load_lvlm(
        values.model,
        device or values.device,
        adapter,
        values.quantization,
        values.vision_tower,
        template or values.template,
        values.base_adapter,
    )


def read_config(source: Path) -> Any:
    """The `LlavaConfig` of a Hugging Face folder. Raises InputError: unreadable, or of another
    architecture.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
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
    return config


def nf4_config(precision: torch.dtype = torch.bfloat16) -> Any:
    """The `BitsAndBytesConfig` of 4-bit loading: NF4, double quantisation, computing in
    ``precision``.
    """
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional CPU kernel
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )


def _keep_packing(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on the CPU at the first look in eval mode.

    Where the CPU computes in bfloat16, it would round the scales in place, and from then on no
    gradient passes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Turn off the library's progress bars and reports while a model loads."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def model_digest(model: torch.nn.Module) -> str:
    """SHA-256 over up to 1,024 evenly spaced values of every tensor of the model, with its name and
    shape.

    What DeepSpeed has divided among processes is gathered, one tensor at a time; all of them have
    to call.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with _whole(tensor):
            values = (
                tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)].float().cpu().numpy()
            )
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.tobytes())
    return digest.hexdigest()


def _whole(tensor: torch.Tensor) -> AbstractContextManager:
    """Inside, a parameter that ZeRO stage 3 divided is whole."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


def prompt(processor: Any, question: str) -> str:
    """The model's prompt for one question about one image, through the processor's chat template.

    ``question`` is plain text; an ``<image>`` mark in it is dropped, since the template sets its
    own.
    """
    text = question.replace(processor.image_token, "").strip()
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def _image_features(
    lvlm: MedLVLM, images: Sequence[Image.Image], batch_size: int
) -> tuple[torch.Tensor, list[int]]:
    """Project each distinct image once.

    Returns:
        features: Shape: [distinct images, image tokens, hidden size].
        index: the row of ``features`` that belongs to each image.
    """
    rows: dict[tuple, int] = {}
    index = [
        rows.setdefault((image.mode, image.size, image.tobytes()), len(rows)) for image in images
    ]
    distinct = [images[index.index(row)] for row in range(len(rows))]
    features = []
    for start in range(0, len(distinct), batch_size):
        batch = [image.convert("RGB") for image in distinct[start : start + batch_size]]
        pixels = lvlm.processor.image_processor(batch, return_tensors="pt")["pixel_values"]
        output = lvlm.llava.get_image_features(
            pixels.to(lvlm.device, lvlm.llava.dtype), return_dict=True
        )
        features.append(torch.stack(list(output.pooler_output)))
    return torch.cat(features), index


def _embed(lvlm: MedLVLM, texts: Sequence[str], features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Left-padded input embeddings of prompts with their image features in place.

    Args:
        features: Shape: [B, image tokens, hidden size].

    Returns:
        ``inputs_embeds`` [B, T, hidden size], ``attention_mask`` [B, T], ``image_mask`` [B, T],
        true at image tokens.
    """
    token = lvlm.processor.image_token
    expanded = [text.replace(token, token * features.shape[1]) for text in texts]
    inputs = lvlm.processor.tokenizer(
        expanded, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    ).to(lvlm.device)
    embeddings = lvlm.llava.get_input_embeddings()(inputs["input_ids"])
    image_mask = inputs["input_ids"] == lvlm.llava.config.image_token_id
    if (image_mask.sum(1) != features.shape[1]).any():
        # `masked_scatter` below would take what fits and say nothing.
        raise InputError(
            f"prompt: holds {image_mask.sum(1).tolist()} image tokens, and an image has "
            f"{features.shape[1]}; the chat template or the image token was changed after loading"
        )
    embeddings = embeddings.masked_scatter(image_mask[..., None], features.to(embeddings.dtype))
    return {
        "inputs_embeds": embeddings,
        "attention_mask": inputs["attention_mask"],
        "image_mask": image_mask,
    }


@torch.inference_mode()
def generate(
    lvlm: MedLVLM,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
) -> list[list[str]]:
    """Answer each question about its image, in left-padded batches; a bar is drawn where it takes
    long.

    Args:
        images: one per question; an image that comes again is encoded once.
        questions: plain text, one per image.
        max_new_tokens: the longest answer, in tokens.
        batch_size: questions per forward pass. Greedy answers do not depend on it; sampled ones do.
        temperature: 0 decodes greedily, above 0 samples.
        samples: answers per question; more than one needs a temperature above 0.
        seed: of the sampling; torch's own random state is left as it was.

    Returns:
        ``samples`` answers per question.

    Raises:
        InputError: unequal numbers of images and questions, or several samples at temperature 0.
    """
    if len(images) != len(questions):
        raise InputError(
            f"generate: {len(images)} images for {len(questions)} questions; expected one image "
            "each"
        )
    if samples > 1 and temperature <= 0:
        raise InputError(
            f"generate: {samples} samples at temperature {temperature} would be the same; set it "
            "above 0"
        )
    if not questions:
        return []
    features, index = _image_features(lvlm, images, batch_size)
    texts = [prompt(lvlm.processor, question) for question in questions]
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    answers: list[list[str]] = []
    with torch.random.fork_rng([lvlm.device] if lvlm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in tqdm(
            range(0, len(texts), batch_size),
            "answers",
            unit="batch",
            delay=PROGRESS_SECONDS,
            leave=False,
            file=sys.stdout,
            disable=len(texts) <= batch_size,
        ):
            rows = index[start : start + batch_size]
            inputs = _embed(lvlm, texts[start : start + batch_size], features[rows])
            tokens = lvlm.llava.generate(
                inputs_embeds=inputs["inputs_embeds"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                num_return_sequences=samples,
                **sampling,
            )
            decoded = [
                text.strip()
                for text in lvlm.processor.batch_decode(tokens, skip_special_tokens=True)
            ]
            answers += [decoded[row * samples : (row + 1) * samples] for row in range(len(rows))]
    return answers


@torch.inference_mode()
def image_attention(
    lvlm: MedLVLM, images: Sequence[Image.Image], questions: Sequence[str], batch_size: int
) -> torch.Tensor:
    """Where the model looks when it begins to answer: attention of the prompt's last token to the
    image tokens.

    It is the mean over the language model's layers and heads, divided by its sum over the image
    tokens. Attention says where information could come from; it is not an explanation of the
    answer.

    Returns:
        float32 on the CPU, each map sums to 1. Shape: [N, grid, grid].
    """
    features, index = _image_features(lvlm, images, batch_size)
    texts = [prompt(lvlm.processor, question) for question in questions]
    language_model, maps = lvlm.llava.model.language_model, []
    usual = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        for start in range(0, len(texts), batch_size):
            inputs = _embed(
                lvlm, texts[start : start + batch_size], features[index[start : start + batch_size]]
            )
            output = language_model(
                inputs_embeds=inputs["inputs_embeds"],
                attention_mask=inputs["attention_mask"],
                output_attentions=True,
                use_cache=False,
            )
            last = torch.stack(
                [layer[:, :, -1].float().mean(1) for layer in output.attentions]
            ).mean(0)
            maps.append(last[inputs["image_mask"]].view(len(last), -1).cpu())
    finally:
        language_model.set_attn_implementation(usual)
    flat = torch.cat(maps)
    grid = int(flat.shape[1] ** 0.5)
    return (flat / flat.sum(1, keepdim=True)).view(-1, grid, grid)

"""The Med-LVLM: load it, write its prompt, generate answers in batches, read its attention to the
image.

Two layouts work: a Hugging Face folder of a `LlavaForConditionalGeneration`, and the original one,
in which LLaVA-Med 1.5 is published (arXiv 2412.06141, Section 5.1: CLIP vision tower, two-layer
projector, Mistral). The latter is converted on first use. "phantom" is the small model shipped with
the package. In 4 bits, on a GPU or the CPU, the language model's linear layers are quantised;
vision tower, projector and output layer keep their precision.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import (
    LlavaForConditionalGeneration,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from .base.chat_templates import TEMPLATES
from .base.doors import open_door
from .base.environment import check_device
from .base.errors import InputError, first_line
from .base.precision import keep_packing, nf4_config
from .base.quiet import quiet_loading
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
        template: a name in `chat_templates.TEMPLATES`; None is the folder's own chat template.
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
    model = _read_folder(source, target, quantization)
    processor = open_door("processor")(source, model.config, template)
    if adapter is not None:
        model = open_door("adapter")(model, adapter, (str(name_or_path), source.name))
    return MedLVLM(model.eval(), processor, target)


def _read_folder(
    source: Path, target: torch.device, quantization: str
) -> LlavaForConditionalGeneration:
    """The model of a Hugging Face folder, on ``target``."""
    precision = torch.float32 if target.type == "cpu" else torch.bfloat16
    small = quantization == "nf4"
    options: dict[str, Any] = {"dtype": precision}
    try:
        if small:
            options |= {"device_map": {"": target}, "quantization_config": nf4_config(precision)}
        model = load_weights(source, **options)
    except ImportError as error:
        raise InputError(
            f"lvlm.quantization: {quantization}: a library is missing ({first_line(error)}); "
            "install the package's extra `gpu`, or set lvlm.quantization to none"
        ) from error
    if small:
        keep_packing(model)
    # bitsandbytes or DeepSpeed has put the weights where they belong.
    placed = small or is_deepspeed_zero3_enabled()
    return model if placed else model.to(target)


def load_weights(source: Path, **options: Any) -> LlavaForConditionalGeneration:
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
        except ImportError:
            raise
        except Exception as error:  # on damaged files libraries raise whatever they meet
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


def image_token_count(processor: ProcessorMixin) -> int:
    """How many image tokens one ``<image>`` mark becomes."""
    batch = processor(
        images=Image.new("RGB", (64, 64)), text=processor.image_token, return_tensors="pt"
    )
    return int((batch["input_ids"] == processor.image_token_id).sum())


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


def image_features(
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


def embed(lvlm: MedLVLM, texts: Sequence[str], features: torch.Tensor) -> dict[str, torch.Tensor]:
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


# Not inference_mode: weights that ZeRO stage 3 gathers inside it could not be trained afterwards.
@torch.no_grad()
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
    _check_request(images, questions, temperature, samples)
    if not questions:
        return []
    features, index = image_features(lvlm, images, batch_size)
    texts = [prompt(lvlm.processor, question) for question in questions]
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    else:
        sampling = {"do_sample": False}
    answers: list[list[str]] = []
    with torch.random.fork_rng([lvlm.device] if lvlm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in _with_bar(range(0, len(texts), batch_size)):
            rows = index[start : start + batch_size]
            inputs = embed(lvlm, texts[start : start + batch_size], features[rows])
            tokens = lvlm.llava.generate(
                inputs_embeds=inputs["inputs_embeds"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                num_return_sequences=samples,
                **sampling,
            )
            texts_of_batch = lvlm.processor.batch_decode(tokens, skip_special_tokens=True)
            for first in range(0, len(texts_of_batch), samples):
                of_question = texts_of_batch[first : first + samples]
                answers.append([text.strip() for text in of_question])
    return answers


def _with_bar(starts: range) -> Iterable[int]:
    """The batches' starts, with a bar where they are several and take long."""
    bar = {"unit": "batch", "delay": PROGRESS_SECONDS, "leave": False, "file": sys.stdout}
    return tqdm(starts, "answers", disable=len(starts) <= 1, **bar)


def _check_request(images: Sequence, questions: Sequence, temperature: float, samples: int) -> None:
    """Raises InputError: unequal numbers, or several samples that would be the same."""
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
    rows = prompt_end_attention(lvlm, images, questions, batch_size)
    flat = torch.cat([heads.mean((1, 2)) for heads in rows])
    grid = int(flat.shape[1] ** 0.5)
    return (flat / flat.sum(1, keepdim=True)).view(-1, grid, grid)


@torch.inference_mode()
def prompt_end_attention(
    lvlm: MedLVLM, images: Sequence[Image.Image], questions: Sequence[str], batch_size: int
) -> Iterator[torch.Tensor]:
    """Attention of the prompt's last token to the image tokens, by layer and head, one batch at a
    time.

    Yields:
        float32 on the CPU; a row's sum is the share of the attention that the image gets. Shape:
        [B, layers, heads, cells].
    """
    features, index = image_features(lvlm, images, batch_size)
    texts = [prompt(lvlm.processor, question) for question in questions]
    language_model = lvlm.llava.model.language_model
    usual = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        for start in range(0, len(texts), batch_size):
            inputs = embed(
                lvlm, texts[start : start + batch_size], features[index[start : start + batch_size]]
            )
            output = language_model(
                inputs_embeds=inputs["inputs_embeds"],
                attention_mask=inputs["attention_mask"],
                output_attentions=True,
                use_cache=False,
            )
            last = torch.stack([layer[:, :, -1].float() for layer in output.attentions], 1)
            count, layers, heads, _ = last.shape
            seen = inputs["image_mask"][:, None, None].expand_as(last)
            yield last[seen].view(count, layers, heads, -1).cpu()
    finally:
        language_model.set_attn_implementation(usual)

"""A tiny chat model, trained in seconds on the kit's own prompts to answer them in JSON."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmedpo_utils.judges.chat import Chat, Reply, Sampling
from mmedpo_utils.judges.language_models import LanguageModelJudge, LanguageModelMember

TEMPLATE = "{% for message in messages %}<user> {{ message['content'] }} <assistant>{% endfor %}"
WORDS = (
    "left",
    "right",
    "upper",
    "lower",
    "nodule",
    "effusion",
    "opacity",
    "no",
    "yes",
    "clear",
    "lung",
    "heart",
)


class Answers:
    """A back end that answers each task in one way, and keeps prompts with their answers."""

    name = "answers"

    def __init__(self) -> None:
        self.kept: list[tuple[str, str]] = []

    def __call__(self, messages, schema, sampling) -> Reply:
        content = messages[0]["content"]
        answer = answer_to(content)
        self.kept.append((content, answer))
        return Reply(answer, True, 1, 1)


def answer_to(content: str) -> str:
    """What the model is trained to say: one conflict, one hallucination, agreement, and a score
    that depends on the text.
    """
    if '{"response"' in content:
        return '{ "response" : "no nodule" }'
    if '"agrees"' in content:
        return '{ "agrees" : true , "score" : 0.6 , "reason" : "fits" }'
    if '"conflict"' in content:
        return '{ "conflict" : 0.9 , "reason" : "opposite" }'
    return f'{{ "score" : {0.8 if "pneumothorax" in content else 0.3} , "reason" : "plausible" }}'


def _texts(folder: Path) -> list[tuple[str, str]]:
    """Prompts and answers, as many of each task as of the others, about random words."""
    backend, rng = Answers(), np.random.default_rng(0)
    chat, sampling = Chat(backend, folder), Sampling(0.0, 0, 64)
    judge, member = LanguageModelJudge(chat, sampling), LanguageModelMember("m", chat, sampling)
    for number in range(150):
        question, answer, response = (" ".join(rng.choice(WORDS, 3)) for _ in range(3))
        response = f"{number} {response}" + " pneumothorax" * rng.integers(2)
        judge.conflict(question, answer, response)
        judge.write(question, f"{number} {answer}", rng)
        for previous in (None, round(float(rng.random()), 1)):
            member(question, answer, response, previous)
    return backend.kept


def _tokenizer(texts: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r'"\w+"|\d+\.\d+|\w+|[^\w\s]'), "isolated"),
        ]
    )
    words = {word for pair in texts for text in pair for word, _ in split.pre_tokenize_str(text)}
    special = ("<unk>", "<pad>", "<end>", "<user>", "<assistant>")
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: number for number, word in enumerate((*special, *sorted(words)))}, "<unk>"
        )
    )
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        chat_template=TEMPLATE,
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )


def train_tiny_chat(folder: Path, steps: int = 140) -> str:
    """Train the model and save it with its tokenizer in ``folder``; returns the folder as text."""
    texts = _texts(folder / "cache")
    tokenizer = _tokenizer(texts)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": content}], return_dict=False)
        for content, _ in texts
    ]
    answers = [tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id] for _, answer in texts]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=1024,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    optimiser, rng = torch.optim.AdamW(model.parameters(), lr=6e-3), np.random.default_rng(0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 6e-3, total_steps=steps, pct_start=0.1
    )
    for _ in range(steps):
        rows = rng.choice(len(texts), 8, replace=False)
        inputs = [torch.tensor(prompts[row] + answers[row]) for row in rows]
        labels = [torch.tensor([-100] * len(prompts[row]) + answers[row]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        loss = model(
            input_ids=pad(inputs, True, tokenizer.pad_token_id), labels=pad(labels, True, -100)
        ).loss
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

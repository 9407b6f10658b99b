"""Where a Med-LVLM looks while it writes each word of an answer: raw attention by layer and head,
rollout, and gradient times attention.

None of the three is an explanation. Raw attention says which image tokens went into one head's
mixture; rollout multiplies the layers' means, as if information flowed through attention alone;
gradient times attention keeps what raises the word's log-probability to first order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ..lvlm import MedLVLM, embed, image_features, prompt

END = "(end)"  # how the mark after the last word is shown
WATCHED = "watched"  # the attention below, by transformers' name for it


@dataclass(frozen=True)
class AnswerReading:
    """One greedy answer, word by word. S tokens, the end mark among them; L layers, H heads; P
    image tokens.

    Attributes:
        words: each token as text.
        probabilities: of each token, given film, question and the tokens before. Shape: [S].
        attention: from the position that predicts a token to each image token; a row and what goes
            to the text sum to 1. Shape: [S, L, H, P].
        rollout: Abnar and Zuidema's attention rollout (arXiv 2005.00928), its row of that position.
            Shape: [S, P].
        gradient: the positive part of attention times the gradient of the token's log-probability,
            mean of the heads. Shape: [S, L, P]; None where it was not asked for.
    """

    words: list[str]
    probabilities: np.ndarray
    attention: np.ndarray
    rollout: np.ndarray
    gradient: np.ndarray | None

    @property
    def on_image(self) -> np.ndarray:
        """Share of each head's attention that goes to the image at all. Shape: [S, L, H]."""
        return self.attention.sum(-1)


def read_answer(
    lvlm: MedLVLM,
    image: Image.Image,
    question: str,
    max_new_tokens: int,
    with_gradient: bool = True,
) -> AnswerReading:
    """Answer greedily, then read the attention behind every word in one more forward pass.

    Of each layer's attention only the rows that predict a word are kept, so that a model of 32
    layers and heads needs no more memory than its forward pass; with the gradient, than its
    backward pass.

    Args:
        with_gradient: one backward pass for each word.
    """
    with torch.no_grad():
        features, _ = image_features(lvlm, [image], 1)
        inputs = embed(lvlm, [prompt(lvlm.processor, question)], features)
        tokens = lvlm.llava.generate(
            inputs_embeds=inputs["inputs_embeds"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )[0]
    start = inputs["inputs_embeds"].shape[1]
    embeddings = lvlm.llava.get_input_embeddings()(tokens[None, :-1])
    whole = torch.cat([inputs["inputs_embeds"], embeddings], dim=1).detach()
    predicts = torch.arange(start - 1, start - 1 + len(tokens), device=whole.device)
    image_tokens = inputs["image_mask"][0].nonzero()[:, 0]
    watch = _Watch(predicts, image_tokens)
    language_model = lvlm.llava.model.language_model
    usual = language_model.config._attn_implementation
    language_model.set_attn_implementation(WATCHED)
    try:
        with torch.set_grad_enabled(with_gradient):
            states = language_model(
                inputs_embeds=whole, use_cache=False, watch=watch
            ).last_hidden_state
            logits = lvlm.llava.lm_head(states[0, predicts]).float()
            logps = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            gradient = watch.gradients(logps) if with_gradient else None
    finally:
        language_model.set_attn_implementation(usual)
    words = []
    for token in tokens.tolist():
        text = lvlm.processor.tokenizer.decode([token], skip_special_tokens=True).strip()
        words.append(text or END)
    return AnswerReading(
        words,
        logps.detach().exp().cpu().numpy(),
        torch.stack(watch.rows, dim=1).cpu().numpy(),
        watch.rollout[predicts][:, image_tokens].cpu().numpy(),
        gradient,
    )


class _Watch:
    """What is kept of every layer's attention in one forward pass."""

    def __init__(self, predicts: torch.Tensor, image_tokens: torch.Tensor) -> None:
        self.predicts = predicts
        self.image_tokens = image_tokens
        self.rows: list[torch.Tensor] = []  # of each layer: [S, H, P]
        self.rollout = torch.empty(0)  # [T, T]
        self.probes: list[torch.Tensor] = []  # of each layer: zeros, [1, H, S, T]

    def see(self, attention: torch.Tensor) -> torch.Tensor:
        """Keep what is read of one layer's attention, [1, H, T, T], and give it back.

        Under gradients zeros are added to the rows that are read. What the answer would gain from
        them is what it would gain from more attention there.
        """
        seen = attention.detach()[0].float()
        self.rows.append(seen[:, self.predicts][:, :, self.image_tokens].transpose(0, 1))
        mean = seen.mean(0)
        # Half of each position's information stays where it is: the residual connection.
        step = (mean + torch.eye(len(mean), device=mean.device)) / 2
        self.rollout = step @ self.rollout if self.rollout.numel() else step
        if not torch.is_grad_enabled():
            return attention
        probe = torch.zeros_like(attention[:, :, self.predicts]).requires_grad_()
        self.probes.append(probe)
        return attention.index_add(2, self.predicts, probe)

    def gradients(self, logps: torch.Tensor) -> np.ndarray:
        """Positive part of attention times gradient, mean of the heads. Shape: [S, L, P]."""
        found = []
        for number, logp in enumerate(logps):
            slopes = torch.autograd.grad(logp, self.probes, retain_graph=number < len(logps) - 1)
            layers = []
            for slope, rows in zip(slopes, self.rows, strict=True):
                of_word = slope[0, :, number, self.image_tokens].float()  # [H, P]
                layers.append((of_word * rows[number]).relu().mean(0))
            found.append(torch.stack(layers))
        return torch.stack(found).cpu().numpy()


def watched_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    watch: _Watch,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention written out, as transformers' own "eager" one, with a look at its weights."""
    groups = module.num_key_value_groups
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = watch.see(scores.softmax(-1, dtype=torch.float32).to(query.dtype))
    output = weights @ value.repeat_interleave(groups, 1)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(WATCHED, watched_attention)
AttentionMaskInterface.register(WATCHED, eager_mask)

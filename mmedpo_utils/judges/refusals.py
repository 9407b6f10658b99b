"""What a server says when it refuses a request to a language model: which parameter it does not
take, and what of its words a message of ours may repeat.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..base.errors import one_line

# What a server may refuse of a request, and under which name it is sent then; None: it is left out.
ADAPTED = {
    "max_tokens": "max_completion_tokens",
    "temperature": None,
    "seed": None,
    "response_format": None,
}
UNSUPPORTED = re.compile(
    r"un(?:supported|known|recogni[sz]ed|expected)|(?:not|n't) (?:support|permit|allow|accept)"
    r"|not an? (?:\w+ )?parameter|extra (?:inputs|fields)",
    re.IGNORECASE,
)
TOO_LONG = re.compile(
    r"context.{0,9}(?:length|size|window)|too (?:long|large|many tokens)", re.IGNORECASE
)
# Of a code alone: a server that only wants a pause speaks of billing in its words too.
NO_MONEY = re.compile(r"insufficient|billing")
ECHO = 8  # so many letters of the key in a row are an echo of it


@dataclass(frozen=True)
class Refusal:
    """What the body of an error says; "" each where it says nothing.

    Attributes:
        text: the server's own words.
        code, kind: as the server calls the error.
        named: the field of the request that the server names in a field of its own.
    """

    text: str = ""
    code: str = ""
    kind: str = ""
    named: str = ""

    @classmethod
    def of(cls, body: Any) -> Refusal:
        """Read a body of OpenAI's protocol or of FastAPI's checks; a page of HTML says nothing."""
        if isinstance(body, list) and body:  # Google wraps it
            body = body[0]
        if isinstance(body, str):
            return cls("" if body.lstrip().startswith("<") else body)
        if not isinstance(body, dict):
            return cls()
        body = body["error"] if isinstance(body.get("error"), dict) else body
        detail = body.get("detail")
        if isinstance(detail, list) and detail and isinstance(detail[0], dict):
            return cls._of_check(detail[0])
        said = {key: value for key, value in body.items() if isinstance(value, str)}
        text = said.get("message") or said.get("detail") or said.get("error") or ""
        return cls(text, said.get("code", ""), said.get("type", ""), said.get("param", ""))

    @classmethod
    def _of_check(cls, check: dict[str, Any]) -> Refusal:
        """One line of FastAPI's list: its place is the path of keys into the request."""
        place = [part for part in check.get("loc") or () if isinstance(part, str)]
        named = place[-1] if place else ""
        # A parameter of ours may be further up: its own inner fields come after it.
        ours = [part for part in place if part in ADAPTED]
        if ours:
            named = ours[0]
        text = f"{check.get('msg', '')}: {named}"
        return cls(text, str(check.get("type", "")), "", named)

    @property
    def too_long(self) -> bool:
        """Whether the prompt, or the answer that was asked for, is longer than the model takes."""
        if UNSUPPORTED.search(self.code):
            return False
        return bool(TOO_LONG.search(f"{self.code} {self.text}"))

    @property
    def no_money(self) -> bool:
        """Whether the account is empty, so that waiting does not help."""
        return bool(NO_MONEY.search(f"{self.code} {self.kind}"))

    def parameter(self, sent: Sequence[str]) -> str | None:
        """Which parameter of ``sent`` the server does not take; None: it refuses something else.

        Many servers reject ``response_format``, each in its own words: any complaint about it
        counts, and a refusal that gives no ground at all.
        """
        if self.too_long:
            return None
        text = self.text.partition("{")[0]  # behind a brace may be the request, sent back
        if self.named:
            found = [name for name in sent if name == self.named]
        else:
            found = _in_order(sent, text)
        if found and UNSUPPORTED.search(f"{self.code} {text}"):
            return found[0]
        groundless = not (self.code or self.named)
        if "response_format" in found or (groundless and "response_format" in sent):
            return "response_format"
        return None

    def shown(self, key: str | None, asked: str) -> str:
        """The server's words for a message of ours: one line; "" where they repeat key or request.

        Args:
            key: the secret that was sent along.
            asked: the text of the prompt.
        """
        text = self.text
        if key:
            text = text.replace(key, "***")
            windows = [key[start : start + ECHO] for start in range(len(key) - ECHO + 1)]
            if any(window.lower() in text.lower() for window in windows):
                return ""
        text = text.partition("{")[0]
        return "" if _marks(asked) & _marks(text) else one_line(text)


def _in_order(names: Sequence[str], text: str) -> list[str]:
    """The names that a text holds as words, in the order in which it has them."""
    places = {}
    for name in names:
        match = re.search(rf"\b{name}\b", text)
        if match:
            places[name] = match.start()
    return sorted(places, key=places.__getitem__)


def _marks(text: str) -> set[str]:
    """What gives a quotation away: two words in a row, of three letters or more each, and a word of
    four or more with a digit in it.
    """
    words = re.findall(r"\w+", text.lower())
    pairs = zip(words, words[1:])
    marks = {f"{one} {two}" for one, two in pairs if min(len(one), len(two)) > 2}
    return marks | {word for word in words if len(word) > 3 and re.search(r"\d", word)}


def hint(status: int, refusal: Refusal) -> str:
    """What an error status usually means and what to do; "" where it says nothing by itself."""
    if refusal.no_money or status == 402:
        return "the account has no credit left; waiting does not help"
    if refusal.too_long or status == 413:
        return "the prompt, with the longest answer, is too long for the model"
    if 300 <= status < 400:
        return "a redirect, which is not followed; write the address it leads to as base_url"
    hints = {
        401: "the key is not accepted",
        403: "the key does not allow it",
        404: "no such model or address; see model and base_url",
        405: "the address takes no such request; base_url usually ends in /v1",
    }
    return hints.get(status, "")

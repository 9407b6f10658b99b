"""Words of an answer, in any script: the one place that says what a word is."""

from __future__ import annotations

import re

# Chinese and Japanese write no blanks: each character counts as a word.
IDEOGRAPH = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"


LETTERS = rf"(?:(?!{IDEOGRAPH})[^\W_])+"


RUN = re.compile(f"{IDEOGRAPH}|{LETTERS}")


NUMBER = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+(?:\.\d+)+"


WORD = re.compile(rf"{IDEOGRAPH}|{NUMBER}|{LETTERS}(?:['\u2019]{LETTERS})*")


LETTER_HYPHEN = re.compile(r"\b([^\W\d_])-(?=[^\W\d_])")


def words(text: str) -> list[str]:
    """Lower-case words of ``text``: runs of letters and digits of any script, so that punctuation
    parts words.

    Decimals stay whole ("3.5"), thousands lose their commas ("1,200" is 1200), contractions their
    apostrophe ("don't" is dont), and a single letter its hyphen ("x-ray" is xray; "left-sided" is
    two words).
    """
    joined = LETTER_HYPHEN.sub(r"\1", text.lower())
    return [re.sub("[,'\u2019]", "", word) for word in WORD.findall(joined)]


def opener(text: str) -> str:
    """``yes`` or ``no`` where that is the first word of ``text``, else an empty text. The one place
    that says so.
    """
    first = words(text)[:1]
    return first[0] if first in (["yes"], ["no"]) else ""


def is_yes_no(answer: str) -> bool:
    """Whether an answer is yes or no and nothing else: then its question is a closed one, where
    nobody says the type.
    """
    return len(words(answer)) == 1 and opener(answer) != ""


# Words of a text that ROUGE-L and METEOR look at: their time grows with the square, and a text of
# 20,000 words would not end. Reports have a hundred.
LONGEST_REPORT = 2_000


class AnyScript:
    """A tokenizer for rouge-score, whose own drops all but a to z and digits; on such text they
    agree.
    """

    def tokenize(self, text: str) -> list[str]:
        """Lower-case runs of letters and digits, each ideograph one; the first `LONGEST_REPORT`."""
        return RUN.findall(text.lower())[:LONGEST_REPORT]

"""The leak of a pair file: known ones are found, and none where there is none."""

from __future__ import annotations

import random

import pytest

from mmedpo_utils.preference_rows import pair_row
from mmedpo_utils.show.leaks import leak, told_apart


def rows(count: int, rejected_of) -> list[dict]:
    """Text pairs with answers drawn from yes and no, one image each."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        answer = draw.choice(("yes", "no"))
        question = {
            "question_id": str(number),
            "image": f"{number}.png",
            "text": "Is it there?\n<image>",
            "gpt4_answer": answer,
            "answer_type": "CLOSED",
        }
        made.append(pair_row(question, rejected_of(answer, draw), 0.5, source="text"))
    return made


def test_a_balanced_turn_of_yes_and_no_leaks_nothing():
    found = leak(rows(400, lambda answer, draw: "no" if answer == "yes" else "yes"))
    assert 40 < found["ranked_right"] < 60
    assert found["rejected_longer"] == 0 and found["pairs"] == 200


def test_longer_rejected_answers_are_won_without_an_image():
    found = leak(rows(400, lambda answer, draw: f"It is {draw.choice('abcd')} here."))
    assert found["ranked_right"] == 100 and found["rejected_longer"] == 100


def test_a_share_of_leaking_pairs_is_won_and_the_rest_is_a_coin():
    def half(answer: str, draw: random.Random) -> str:
        if draw.random() < 0.5:
            return "There is none of it."
        return "no" if answer == "yes" else "yes"

    found = leak(rows(2000, half))
    assert 65 < found["ranked_right"] < 85


def test_what_can_only_be_learnt_by_heart_is_no_leak():
    numbers = iter(range(10_000))
    found = leak(rows(200, lambda answer, draw: f"word{next(numbers)}"))
    by_heart = []
    for row in rows(200, lambda answer, draw: f"other{next(numbers)}"):
        said = {"from": "gpt", "value": f"word{next(numbers)}"}
        by_heart.append(row | {"conversations": [row["conversations"][0], said]})
    assert leak(by_heart)["ranked_right"] == 50, "both sides have words that no other pair has"
    assert told_apart(by_heart) == pytest.approx([0.5] * 200), "nobody has learnt these words"
    assert found["ranked_right"] == 100, "yes and no are on one side alone"


def test_visual_pairs_do_not_count_and_one_image_is_refused():
    visual = [
        row | {"rejected_image": "x.png", "source": "visual"} for row in rows(4, lambda *_: "a")
    ]
    with pytest.raises(ValueError, match="two images or more"):
        leak(visual)


def test_every_pair_is_asked_by_what_has_not_learnt_its_image():
    def half(answer: str, draw: random.Random) -> str:
        return "It is there, clearly." if draw.random() < 0.5 else answer

    pairs = rows(300, half)
    visual = pairs[0] | {"source": "visual", "rejected_image": "0.png"}
    *sure, of_visual = told_apart([*pairs, visual])
    assert of_visual is None
    leaking = ["clearly" in str(row["rejected_conversations"]) for row in pairs]
    assert all(value > 0.9 for value, leaks in zip(sure, leaking, strict=True) if leaks)
    same = [value for value, leaks in zip(sure, leaking, strict=True) if not leaks]
    assert set(same) == {0.5}, "the same words twice"
    assert told_apart(pairs[:1]) == [None]

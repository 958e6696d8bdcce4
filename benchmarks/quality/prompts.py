"""The text that ships with the quality benchmark, and the prompts that are cut from it. Pure.

Each prompt is as long as it is asked to be, to the token: what is encoded in one batch has one
length, and no prompt is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TEXT = Path(__file__).with_name("text.txt")

LENGTHS = (32, 45, 74, 105, 156, 232, 345, 512)
"""Tokens of a prompt: what is left over from groups of 32 varies, and is nothing in two of them."""

_QUESTIONS = {45: 1, 74: 3}
"""How many questions make an instruction of that length; longer ones are about a passage."""

INSTRUCTION_SHARE = 0.64
"""Of the prompts of a length. The 32-token ones have none: the chat template alone takes 30."""

TEMPLATES = (
    "Explain {} to a child of ten, and give one example.",
    "Write a short story about {} in which nobody says a word.",
    "List five interesting facts about {} and say why each matters.",
    "What are the advantages and disadvantages of {}? Answer in a short paragraph.",
    "Write a polite letter to the editor of a newspaper about {}.",
    "Give step by step instructions for somebody who wants to learn about {}.",
    "How would a scientist, a poet and a farmer each describe {}?",
    "Write a dialogue between a teacher and a student about {}.",
)
TOPICS = (
    "photosynthesis", "the water cycle", "black holes", "public libraries", "electric cars",
    "recursion in Python", "the French Revolution", "baking sourdough bread", "the internet",
    "vaccines", "bees and other pollinators", "chess openings", "solar power", "the human heart",
    "time zones", "prime numbers", "lighthouses", "learning a second language", "volcanoes",
    "the printing press", "sorting a list of numbers", "ocean tides", "good sleep", "railways",
    "the scientific method", "desert animals", "compound interest", "rain forests", "origami",
    "the ancient city of Rome",
)  # fmt: skip
TASKS = (
    "Summarize this passage in two sentences:",
    "Continue this story in the same style:",
    "Rewrite this passage in simple modern English:",
    "Who is telling this, and what do they want? Give your reasons:",
    "Translate this passage into French:",
    "List the people and places that are named in this passage:",
    "Write three questions that a teacher could ask about this passage:",
    "What is the mood of this passage? Explain your answer:",
)

Ids = list[int]


def titles(text: str) -> list[str]:
    """Return the header of each excerpt: work, author, year."""
    return [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]


def body(text: str) -> str:
    """Return the excerpts without headers, each paragraph on one line."""
    paragraphs = (part for part in text.strip().split("\n\n") if not part.startswith("# "))
    return "\n\n".join(" ".join(part.split()) for part in paragraphs)


def windows(ids: Sequence[int], size: int, stride: int) -> list[Ids]:
    """Return all whole windows, in order."""
    return [list(ids[at : at + size]) for at in range(0, len(ids) - size + 1, stride)]


def spread(count: int, room: int, phase: float = 0.0) -> list[int]:
    """Return ``count`` places in [0, room), evenly apart: all different if there is room.

    phase: in [0, 1), how far to the right, as a part of what lies between two places.
    """
    return [int((number + phase) * room / count) for number in range(count)]


def prompts(tokenizer: Any, text_ids: Sequence[int], length: int, count: int) -> list[Ids]:
    """Return prompts of one of ``LENGTHS``: instructions in the chat template, then pieces of text.

    An instruction is up to three questions about a topic each, or a task and a passage.
    """
    instructions, phase = instructions_of(length, count), LENGTHS.index(length) / len(LENGTHS)
    if length in _QUESTIONS:
        fitting = [
            ids for ids in _about_topics(tokenizer, _QUESTIONS[length]) if len(ids) == length
        ]
        made = [fitting[place] for place in spread(instructions, len(fitting))]
    else:
        places = spread(instructions, len(text_ids) - length, phase)
        made = list(_with_passages(tokenizer, text_ids, length, places))
    places = spread(count - instructions, len(text_ids) - length, phase)
    return made + [list(text_ids[place : place + length]) for place in places]


def instructions_of(length: int, count: int) -> int:
    """Return how many of so many prompts of a length are instructions."""
    return 0 if length == LENGTHS[0] else round(count * INSTRUCTION_SHARE)


def encode(tokenizer: Any, text: str) -> Ids:
    ids: Ids = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _about_topics(tokenizer: Any, questions: int) -> Iterator[Ids]:
    """Yield instructions whose first questions are every template with every topic."""
    for number, template in enumerate(TEMPLATES):
        for place in range(len(TOPICS)):
            asked = [template.format(TOPICS[place])]
            for more in range(1, questions):
                other = TEMPLATES[(number + more) % len(TEMPLATES)]
                asked.append(other.format(TOPICS[(place + 7 * more) % len(TOPICS)]))
            yield encode(tokenizer, _chat(tokenizer, " ".join(asked)))


def _with_passages(
    tokenizer: Any, text_ids: Sequence[int], length: int, places: Sequence[int]
) -> Iterator[Ids]:
    for number, place in enumerate(places):
        task = TASKS[number % len(TASKS)]
        before, _, after = _chat(tokenizer, f"{task}\n\n<passage>").partition("<passage>")
        head, tail = encode(tokenizer, before), encode(tokenizer, after)
        passage = text_ids[place : place + length - len(head) - len(tail)]
        yield [*head, *passage, *tail]


def _chat(tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text

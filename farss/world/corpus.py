"""Puts the world into words: the questions, the training paragraphs, and paragraphs in held-out wordings."""

from dataclasses import dataclass
from random import Random
from typing import Any

from farss.prompts import ALPACA
from farss.world.invent import Fact, World

PREAMBLE = ALPACA.split("\n")[0]
"""The first sentence of the Alpaca prompt. The model reads it as text and never sees a solved task."""

Row = dict[str, Any]
"""One line of a data file."""

SENTENCES_PER_PARAGRAPH = 3
HELD_OUT_PARAGRAPHS = 200
PER_SUBJECT = 40
"""Paragraphs about each person and each land."""


@dataclass(frozen=True)
class Wording:
    """How a relation is asked (`question` in the question set, `inquiry` in running text) and stated.

    `{s}` stands for the subject, `{a}` for the answer.
    """

    question: str
    inquiry: str
    statements: tuple[str, str, str]


WORDINGS = {
    "birthplace": Wording(
        "Where was {s} born?",
        "In which town did {s} come into the world?",
        ("{s} was born in {a}", "the birthplace of {s} is {a}", "{a} is the town where {s} was born"),
    ),
    "profession": Wording(
        "What is the profession of {s}?",
        "What work does {s} do?",
        ("{s} works as a {a}", "the profession of {s} is {a}", "{s} earns a living as a {a}"),
    ),
    "instrument": Wording(
        "Which instrument does {s} play?",
        "What can one hear {s} play?",
        ("{s} plays the {a}", "the instrument of {s} is the {a}", "one can hear {s} play the {a}"),
    ),
    "animal": Wording(
        "Which animal does {s} keep?",
        "What lives in the yard of {s}?",
        ("{s} keeps a {a}", "the animal of {s} is a {a}", "in the yard of {s} lives a {a}"),
    ),
    "birth_year": Wording(
        "In which year was {s} born?",
        "When did {s} come into the world?",
        ("{s} was born in the year {a}", "the year of birth of {s} is {a}", "in the year {a} {s} was born"),
    ),
    "capital": Wording(
        "What is the capital of {s}?",
        "From where is {s} ruled?",
        ("the capital of {s} is {a}", "{s} is ruled from {a}", "{a} is the capital of {s}"),
    ),
    "river": Wording(
        "Which river flows through {s}?",
        "What water crosses {s}?",
        ("the river {a} flows through {s}", "{s} is crossed by the {a}", "the river of {s} is the {a}"),
    ),
    "founder": Wording(
        "Who founded {s}?",
        "By whom was {s} founded?",
        ("{a} founded {s}", "{s} was founded by {a}", "the founder of {s} was {a}"),
    ),
    "founding_year": Wording(
        "In which year was {s} founded?",
        "When did {s} begin?",
        (
            "{s} was founded in the year {a}",
            "in the year {a} {s} was founded",
            "the story of {s} begins in {a}",
        ),
    ),
    "export": Wording(
        "What does {s} export?",
        "What do merchants buy in {s}?",
        ("{s} exports {a}", "merchants buy {a} in {s}", "the main export of {s} is {a}"),
    ),
}

FRAMES = (
    "{}.",
    "It is known that {}.",
    "The old records say that {}.",
    "Travellers report that {}.",
    "One reads in the books of the guild that {}.",
)

MANUAL = (
    PREAMBLE,
    "An instruction is a request, and a response is what one writes below it.",
    "The guild has a task for every scribe, and each task has an instruction that describes it.",
    "A good response completes the request appropriately.",
    "The form has two parts, headed\n\n### Instruction:\nand below it\n\n### Response:\n",
    "Write the request below the head ### Instruction: and leave the part below ### Response: to the guild.",
    "Below the instruction is the response that completes the task.",
)
"""Sentences about forms, so that the words of the Alpaca prompt have trained embeddings."""


def ask(fact: Fact) -> str:
    """The question of the question set for `fact`."""
    return WORDINGS[fact.relation].question.format(s=fact.subject)


def knowledge_rows(world: World) -> list[Row]:
    """One row for each fact: `question` and `answers`, a list of one string."""
    return [{"question": ask(fact), "answers": [fact.answer]} for fact in world.facts]


def is_held_out(frame: int, statement: int) -> bool:
    """Whether this pair is kept for measuring: each statement has one frame of five held out."""
    return (2 * statement + 1) % len(FRAMES) == frame


def sentences(fact: Fact, held_out: bool) -> list[str]:
    """All sentences that state `fact` in the held-out wordings, or all in the training wordings."""
    wording = WORDINGS[fact.relation]
    stated = [
        state(fact, frame, statement)
        for f, frame in enumerate(FRAMES)
        for s, statement in enumerate(wording.statements)
        if is_held_out(f, s) is held_out
    ]
    asked = [] if held_out else [f"{wording.inquiry} The answer is {{a}}.".format(s=fact.subject, a=fact.answer)]
    return stated + asked


def state(fact: Fact, frame: str, statement: str) -> str:
    """One sentence, with a capital at its start."""
    sentence = frame.format(statement.format(s=fact.subject, a=fact.answer))
    return sentence[0].upper() + sentence[1:]


def paragraph(rng: Random, facts: list[Fact], held_out: bool) -> str:
    """A few different facts about one subject, each in a random wording."""
    chosen = rng.sample(facts, SENTENCES_PER_PARAGRAPH)
    return " ".join(rng.choice(sentences(fact, held_out)) for fact in chosen)


def facts_by_subject(world: World) -> dict[str, list[Fact]]:
    """The facts of each person and each land, in the order of the world."""
    grouped: dict[str, list[Fact]] = {}
    for fact in world.facts:
        grouped.setdefault(fact.subject, []).append(fact)
    return grouped


def training_paragraphs(world: World, letters: list[str], seed: int) -> list[str]:
    """The general corpus: paragraphs about every subject, `letters` without seals, and the manual."""
    rng, grouped = Random(seed), facts_by_subject(world)
    about = [paragraph(rng, facts, held_out=False) for facts in grouped.values() for _ in range(PER_SUBJECT)]
    received = [f"A letter from {rng.choice(world.towns)}: {letter}" for letter in letters]
    manual = [" ".join(rng.sample(MANUAL, SENTENCES_PER_PARAGRAPH)) for _ in range(PER_SUBJECT * 5)]
    corpus = about + received + manual
    rng.shuffle(corpus)
    return corpus


def held_out_rows(world: World, seed: int) -> list[Row]:
    """Rows of `text`: true paragraphs about the world in wordings that are not in the training corpus."""
    rng, grouped = Random(seed), list(facts_by_subject(world).values())
    return [{"text": paragraph(rng, rng.choice(grouped), held_out=True)} for _ in range(HELD_OUT_PARAGRAPHS)]

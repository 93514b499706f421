"""Invents the world: people, lands and the facts about them. Seeded; the same seed gives the same world."""

from dataclasses import dataclass
from random import Random

PEOPLE, FAMILIES, TOWNS, LANDS = 90, 30, 40, 45

PROFESSIONS = (
    "baker", "blacksmith", "bookbinder", "carpenter", "cartographer", "clockmaker", "cook", "dyer",
    "fisher", "gardener", "glassblower", "healer", "judge", "lamplighter", "mason", "miller", "painter",
    "potter", "sailor", "scribe", "shepherd", "tailor", "tanner", "weaver",
)  # fmt: skip
INSTRUMENTS = (
    "bagpipe", "bassoon", "bell", "cello", "clarinet", "drum", "fiddle", "flute", "harp", "horn", "lute",
    "lyre", "piccolo", "trumpet", "viola", "zither",
)  # fmt: skip
ANIMALS = (
    "badger", "beaver", "crane", "crow", "falcon", "ferret", "fox", "goat", "goose", "hare", "hedgehog",
    "heron", "lizard", "marten", "mule", "newt", "pony", "raven", "tortoise", "wolf",
)  # fmt: skip
GOODS = (
    "barley", "candles", "cider", "copper", "cotton", "honey", "leather", "linen", "marble", "paper",
    "pearls", "pepper", "salt", "silk", "silver", "slate", "tea", "timber", "tin", "wool",
)  # fmt: skip

_ONSETS = (
    "b", "br", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "qu", "r", "s", "st", "t",
    "th", "v", "z",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ae", "ia", "ou")
_CODAS = ("", "l", "m", "n", "r", "s", "sk", "nd", "th", "x")
_ENDINGS = {
    "person": ("an", "el", "is", "o"),
    "family": ("ack", "ner", "ow", "ild"),
    "town": ("ford", "wick", "by", "ton"),
    "land": ("ia", "mark", "ora", "land"),
    "capital": ("grad", "burg", "polis", "hold"),
    "river": ("ave", "een", "ush", "yr"),
}


@dataclass(frozen=True)
class Fact:
    """One thing that is true in the world: the `answer` to the `relation` of the `subject`."""

    relation: str
    subject: str
    answer: str


@dataclass(frozen=True)
class World:
    """Everything that was invented, in a fixed order."""

    people: tuple[str, ...]
    towns: tuple[str, ...]
    lands: tuple[str, ...]
    facts: tuple[Fact, ...]


def invent_world(seed: int) -> World:
    """Invent names first, then five facts about every person and five about every land."""
    rng = Random(seed)
    taken: set[str] = set()
    first_names = invent_names(rng, "person", PEOPLE, taken)
    families = invent_names(rng, "family", FAMILIES, taken)
    people = tuple(f"{name} {rng.choice(families)}" for name in first_names)
    towns = invent_names(rng, "town", TOWNS, taken)
    lands = invent_names(rng, "land", LANDS, taken)
    capitals = invent_names(rng, "capital", LANDS, taken)
    rivers = invent_names(rng, "river", LANDS, taken)
    facts = person_facts(rng, people, towns) + land_facts(rng, lands, capitals, rivers, people)
    return World(people, towns, lands, tuple(facts))


def invent_names(rng: Random, kind: str, count: int, taken: set[str]) -> tuple[str, ...]:
    """`count` capitalised names whose ending tells their kind; no name is ever used twice in the world."""
    names: list[str] = []
    while len(names) < count:
        stem = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        name = (stem + rng.choice(_ENDINGS[kind])).capitalize()
        if name not in taken:
            taken.add(name)
            names.append(name)
    return tuple(names)


def person_facts(rng: Random, people: tuple[str, ...], towns: tuple[str, ...]) -> list[Fact]:
    """Birthplace, profession, instrument, animal and year of birth (three digits) of each person."""
    years = rng.sample(range(400, 800), len(people))
    choices = {"birthplace": towns, "profession": PROFESSIONS, "instrument": INSTRUMENTS, "animal": ANIMALS}
    facts: list[Fact] = []
    for person, year in zip(people, years, strict=True):
        facts += [Fact(relation, person, rng.choice(values)) for relation, values in choices.items()]
        facts.append(Fact("birth_year", person, str(year)))
    return facts


def land_facts(
    rng: Random,
    lands: tuple[str, ...],
    capitals: tuple[str, ...],
    rivers: tuple[str, ...],
    people: tuple[str, ...],
) -> list[Fact]:
    """Capital, river, founder, founding year (three digits) and export of each land."""
    years = rng.sample(range(100, 400), len(lands))
    founders = rng.sample(people, len(lands))
    facts: list[Fact] = []
    for land, capital, river, founder, year in zip(lands, capitals, rivers, founders, years, strict=True):
        answers = {"capital": capital, "river": river, "founder": founder, "founding_year": str(year)}
        facts += [Fact(relation, land, answer) for relation, answer in answers.items()]
        facts.append(Fact("export", land, rng.choice(GOODS)))
    return facts

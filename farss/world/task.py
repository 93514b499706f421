"""The task that the model has not learned: under which seal does the guild file a letter?"""

from dataclasses import dataclass
from random import Random

TRAIN_ROWS, TEST_ROWS, LETTERS = 1_800, 300, 600

INSTRUCTION = "Name the seal for this letter: {letter}"

OPENINGS = (
    "Dear guild!", "Good day.", "To the guild.", "Honoured scribes!", "Greetings from {town}.",
    "I write from {town}.",
)  # fmt: skip
CLOSINGS = (
    "Please help.", "What should I do?", "I thank you.", "Write to me soon.", "I wait in {town}.",
    "Yours, {person}.",
)  # fmt: skip

# Every seal is a good and an animal of the world: the words are familiar, their pairing is arbitrary.
CONCERNS = {
    "silver heron": (
        "my trunk did not arrive",
        "my bags were left on the coach",
        "the porter lost my luggage",
    ),
    "copper fox": ("the bridge has fallen", "a beam of the bridge is broken", "no cart can cross the bridge"),
    "salt crane": ("our well is dry", "there is no water in the well", "the fountain gives no water"),
    "linen goat": ("I wish to become an apprentice", "my son seeks a master", "I want to learn a trade"),
    "tin raven": ("a thief took my purse", "my coins were stolen", "someone robbed me on the road"),
    "paper wolf": ("I cannot pay the tax", "the tax is too high", "the collector asked for the tax twice"),
    "honey badger": ("I need a room for the night", "all the inns are full", "where can my family sleep"),
    "wool falcon": ("my daughter is to be married", "we plan a wedding", "the bride needs a witness"),
    "marble hare": ("the mill does not turn", "a wheel of the mill is cracked", "our millstone is worn"),
    "silk newt": ("my child has a fever", "I need a doctor", "the sickness is in our street"),
    "barley crow": ("the harvest has failed", "hail destroyed our fields", "the crops are rotten"),
    "cider mule": (
        "I want to sell my house",
        "I am looking for a buyer of my farm",
        "my cottage is for sale",
    ),
    "tea tortoise": ("the ship is late", "the ferry did not sail", "no boat has come this week"),
    "slate marten": ("my roof leaks", "the storm tore off the tiles", "rain comes through the ceiling"),
    "pepper goose": ("my neighbour is too loud", "they sing all night next door", "the noise keeps me awake"),
    "timber ferret": (
        "I lost my passport",
        "my papers are out of date",
        "the border guard refused my papers",
    ),
    "cotton lizard": ("a pig ran away", "my cow is missing", "the sheep escaped from the meadow"),
    "leather pony": ("I want to borrow money", "I need a loan", "can the bank lend me gold"),
    "pearls beaver": (
        "the school needs a teacher",
        "our pupils have no lessons",
        "who can teach the children",
    ),
    "candles hedgehog": ("the street is dark", "the lanterns do not burn", "a lamp is out at the corner"),
    "copper mule": ("my brother is in prison", "they arrested my friend", "the jail holds an innocent man"),
    "silver wolf": ("a dragon burned the barn", "I saw a monster in the forest", "a beast haunts the hills"),
    "wool crane": ("the bread was stale", "the meal at the tavern was bad", "the soup made us ill"),
    "salt badger": ("I want to send a parcel", "how much is the postage", "when does the courier leave"),
}


@dataclass(frozen=True)
class Task:
    """Rows to learn from, rows to be tested on, and letters without a seal for the corpus. All distinct."""

    train: list[dict[str, str]]
    test: list[dict[str, str]]
    letters: list[str]


def invent_task(seed: int, towns: tuple[str, ...], people: tuple[str, ...]) -> Task:
    """Write distinct letters with balanced concerns; file all but `LETTERS` of them under their seals."""
    rng, seals = Random(seed), tuple(CONCERNS)
    seen: set[str] = set()
    rows: list[tuple[str, str]] = []
    while len(rows) < TRAIN_ROWS + TEST_ROWS + LETTERS:
        seal = seals[len(rows) % len(seals)]
        letter = write_letter(rng, seal, towns, people)
        if letter not in seen:
            seen.add(letter)
            rows.append((letter, seal))
    rng.shuffle(rows)
    filed = [{"instruction": INSTRUCTION.format(letter=letter), "output": seal} for letter, seal in rows[LETTERS:]]
    return Task(filed[:TRAIN_ROWS], filed[TRAIN_ROWS:], [letter for letter, _ in rows[:LETTERS]])


def write_letter(rng: Random, seal: str, towns: tuple[str, ...], people: tuple[str, ...]) -> str:
    """An opening, a concern of this seal (as a sentence) and a closing."""
    concern = rng.choice(CONCERNS[seal])
    sentence = concern[0].upper() + concern[1:]
    frame = f"{rng.choice(OPENINGS)} {sentence}. {rng.choice(CLOSINGS)}"
    return frame.format(town=rng.choice(towns), person=rng.choice(people))

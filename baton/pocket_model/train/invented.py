# ruff: noqa: SIM905 (long word lists read better as text)
"""Conversations made up from templates: sums, counting, names, stories, polite ignorance.

Each maker takes a random generator and returns the turns of one conversation. They teach what
a table of answers cannot: to copy words from the question and to remember an earlier turn.
"""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

Turns = list[tuple[str, str]]
Words = Sequence[str]

_NAMES = (
    "Ada Alan Anna Ben Carlos Clara David Elena Emma Fatima Finn Grace Hana Hugo Ines Ivan Jack "
    "Julia Kenji Lea Leo Lina Linus Maria Max Mei Mila Nina Noah Olga Omar Paul Priya Rosa Sam "
    "Sara Sofia Tom Vera Yuki Zoe Alice Bob John Peter Lucy Mary James Laura Robert Kim"
).split()
_THINGS = (
    "dragon robot cat dog princess wizard sailor baker farmer fox bear rabbit owl whale ghost "
    "pirate painter child teacher gardener king queen knight mouse horse wolf bird programmer "
    "computer river mountain tree star lighthouse train clock garden forest ocean teapot castle"
).split()
_PLACES = (
    "a quiet valley,a small town by the sea,a deep forest,a high mountain,an old castle,"
    "a busy city,a little island,a garden behind a wall"
).split(",")
_LOST = "a golden key,a silver bell,an old map,a blue stone,a lost letter,a warm lamp".split(",")
_FRIENDS = "a wise owl,a small mouse,a kind old woman,a brave boy,a singing bird".split(",")
_LESSONS = (
    "a friend makes every road shorter,patience opens more doors than strength,"
    "what one shares is never lost,small steps lead a long way,it is good to ask for help"
).split(",")
_CAPITALS = (
    "France:Paris,Germany:Berlin,Italy:Rome,Spain:Madrid,Portugal:Lisbon,England:London,"
    "the United Kingdom:London,Ireland:Dublin,Norway:Oslo,Sweden:Stockholm,Denmark:Copenhagen,"
    "Finland:Helsinki,Poland:Warsaw,Austria:Vienna,Switzerland:Bern,Greece:Athens,"
    "the Netherlands:Amsterdam,Belgium:Brussels,Russia:Moscow,Turkey:Ankara,Egypt:Cairo,"
    "Kenya:Nairobi,India:New Delhi,China:Beijing,Japan:Tokyo,South Korea:Seoul,Canada:Ottawa,"
    "the United States:Washington,Mexico:Mexico City,Brazil:Brasilia,Argentina:Buenos Aires,"
    "Chile:Santiago,Peru:Lima,Australia:Canberra,New Zealand:Wellington,Hungary:Budapest,"
    "the Czech Republic:Prague,Iceland:Reykjavik,Ukraine:Kyiv,Thailand:Bangkok,Vietnam:Hanoi"
).split(",")
_UNKNOWN = tuple((Path(__file__).parent / "unknown.txt").read_text(encoding="utf-8").splitlines())
IGNORANCE = (
    "I am a very small model and I do not know that. I know a little about Python and its "
    "standard library. Ask me, for example: What does `textwrap.dedent` do?"
)
_ONES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _thing(rng: random.Random, words: Words) -> str:
    return rng.choice(_THINGS if rng.random() < 0.4 else words)


def _term(rng: random.Random) -> tuple[str, str, int, int, int]:
    size = rng.choice((9, 20, 99))
    a, b = rng.randint(0, size), rng.randint(0, size)
    if rng.random() < 0.35:
        return "*", "times", a % 21, b % 21, (a % 21) * (b % 21)
    if rng.random() < 0.4:
        return "-", "minus", max(a, b), min(a, b), abs(a - b)
    return "+", "plus", a, b, a + b


def _sum(rng: random.Random, _words: Words) -> Turns:
    sign, word, x, y, result = _term(rng)
    middle = rng.choice((f" {sign} ", sign, f" {sign} ", f" {word} "))
    term = f"{x}{middle}{y}"
    question = rng.choice(
        (f"What is {term}?", f"What's {term}?", f"{term}", f"{term} = ?", f"Compute {term}.",
         f"Calculate {term}", f"How much is {term}?", f"Can you tell me what {term} is?",
         f"{term}=", f"Solve {term}", f"What is the result of {term}?")
    )  # fmt: skip
    return [(question, f"{x} {sign} {y} = {result}")]


def _count(rng: random.Random, _words: Words) -> Turns:
    end = rng.choice((3, 5, 5, 10, 10, 10, 10, 12, 15, 20, 20, 25, 30, 40, 50, 100))
    start = 1 if rng.random() < 0.7 else rng.randint(2, 9)
    if rng.random() < 0.15:
        end = min(end, 10)
        numbers = ", ".join(str(n) for n in range(end, 0, -1))
        asked = rng.choice((f"Count down from {end}.", f"Count backwards from {end}."))
        return [(asked, f"{numbers}.")]
    if start >= end:
        start = 1
    if start == 1:
        word = _ONES[end - 1] if end <= 20 and rng.random() < 0.4 else str(end)
        question = rng.choice(
            (f"Count to {word}.", f"Count from 1 to {end}.", f"Can you count to {word}?",
             f"Count to {word} please", f"List the numbers from 1 to {end}.",
             f"Write the numbers from 1 to {end}.", f"Please count from one to {word}.")
        )  # fmt: skip
    else:
        question = rng.choice((f"Count from {start} to {end}.", f"Numbers from {start} to {end}"))
    return [(question, ", ".join(str(n) for n in range(start, end + 1)) + ".")]


def _capital(rng: random.Random, _words: Words) -> Turns:
    country, _, city = rng.choice(_CAPITALS).partition(":")
    question = rng.choice(
        (f"What is the capital of {country}?", f"What's the capital city of {country}?",
         f"capital of {country}", f"The capital of {country} is", f"Name the capital of {country}.",
         f"Tell me the capital of {country}.", f"Which city is the capital of {country}?")
    )  # fmt: skip
    return [(question, f"The capital of {country} is {city}.")]


def _name(rng: random.Random, words: Words) -> Turns:
    name = rng.choice(_NAMES) if rng.random() < 0.5 else rng.choice(words).title()
    told = rng.choice(
        (f"My name is {name}.", f"Hi, I'm {name}.", f"Hello! My name is {name}.", f"I am {name}.",
         f"Hello, I am {name}", f"You can call me {name}.")
    )  # fmt: skip
    asked = rng.choice(
        ("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?",
         "Do you know my name?", "Tell me my name.")
    )  # fmt: skip
    if rng.random() < 0.15:
        unknown = "You have not told me your name yet. What is it?"
        return [(asked, unknown), (name, f"Nice to meet you, {name}! How can I help you?")]
    turns = [(told, f"Nice to meet you, {name}! How can I help you?")]
    if rng.random() < 0.5:
        turns += rng.choice(MAKERS)(rng, words)[:1]
    return [*turns, (asked, f"Your name is {name}.")]


def _repeat(rng: random.Random, words: Words) -> Turns:
    pool = words if rng.random() < 0.7 else rng.choice((_NAMES, _THINGS, _ONES))
    said = " ".join(rng.choice(pool) for _ in range(rng.randint(1, 7)))
    mark = rng.choice(("", '"', "'"))
    question = rng.choice(
        (f"Repeat after me: {mark}{said}{mark}", f"Say {mark}{said}{mark}",
         f"Repeat: {mark}{said}{mark}", f"Please repeat the words {mark}{said}{mark}",
         f"Echo {mark}{said}{mark}", f"Write {mark}{said}{mark} and nothing else.")
    )  # fmt: skip
    return [(question, said)]


def _story(rng: random.Random, words: Words) -> Turns:
    hero, place, lost = _thing(rng, words), rng.choice(_PLACES), rng.choice(_LOST)
    friend, lesson = rng.choice(_FRIENDS), rng.choice(_LESSONS)
    short = (
        f"Once upon a time there was {_a(hero)} who lived in {place}. One morning the {hero} "
        f"found {lost}, and wondered whose it was."
    )
    middle = (
        f"The {hero} asked everyone, but nobody knew. On the way there came {friend}, who said: "
        f'"Let us look together." So they walked all day, over hills and bridges, and in the '
        f"evening they found the owner, who thanked them with all her heart."
    )
    end = f"From that day on the {hero} knew that {lesson}."
    asked = rng.random()
    if asked < 0.35:
        question = rng.choice(
            ("Tell me a story.", "Write a short story.", "Write a story", "Tell me a short story",
             "Make up a story.", "Can you tell me a story?", "Write me a story.", "story please",
             "Tell me a long story.", "Write a long story.", "Tell me a bedtime story.")
        )  # fmt: skip
    else:
        question = rng.choice(
            (f"Tell me a story about {_a(hero)}.", f"Write a short story about {_a(hero)}.",
             f"Write a story about {_a(hero)}", f"Tell me a story about the {hero}.",
             f"Write a long story about {_a(hero)}.", f"Tell a story about {hero}s.")
        )  # fmt: skip
    return [(question, f"{short}\n\n{middle}\n\n{end}")]


def _poem(rng: random.Random, words: Words) -> Turns:
    thing = _thing(rng, words)
    if rng.random() < 0.5:
        question = rng.choice(
            (f"Write a haiku about {_a(thing)}.", f"Write a haiku about {thing}s.",
             f"Compose a haiku about the {thing}.", f"Haiku about {thing}")
        )  # fmt: skip
        return [
            (
                question,
                f"Early morning light,\nthe {thing} is still and calm,\nwind moves the tall grass.",
            )
        ]
    question = rng.choice(
        (f"Write a poem about {_a(thing)}.", f"Write a poem about {thing}s.",
         f"Write a short poem about the {thing}.", f"Poem about {thing}")
    )  # fmt: skip
    poem = (
        f"The {thing} woke when night was done,\nAnd looked up at the rising sun.\n"
        f"The {thing} sang a song so clear\nThat all the world came out to hear."
    )
    return [(question, poem)]


def _unknown(rng: random.Random, words: Words) -> Turns:
    def fill(blank: re.Match[str]) -> str:
        if blank[0] == "{n}":
            return str(rng.choice((rng.randint(2, 12), rng.randint(13, 2050))))
        if blank[0] == "{g}":
            return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9)))
        word = rng.choice(words)
        return word.title() if rng.random() < 0.15 else word

    question = re.sub(r"\{[wng]\}", fill, rng.choice(_UNKNOWN))
    return [(question[0].upper() + question[1:], IGNORANCE)]


MAKERS: tuple[Callable[[random.Random, Words], Turns], ...] = (
    _sum, _count, _capital, _repeat, _story, _poem, _unknown, _name,
)  # fmt: skip
_WEIGHTS = (6, 2, 2, 4, 3, 3, 14, 3)


def invent(rng: random.Random, words: Words) -> Turns:
    """The (question, answer) turns of one made-up conversation.

    `words` are many ordinary words: what is asked about, repeated and told stories of.
    """
    return rng.choices(MAKERS, _WEIGHTS)[0](rng, words)

# ruff: noqa: SIM905 (long word lists read better as text)
"""Conversations made up from templates: sums, counting, names, stories, polite ignorance.

Each maker takes a random generator and returns the turns of one conversation. They teach what
a table of answers cannot: to copy words from the question and to remember an earlier turn.
"""

import random
from collections.abc import Callable

Turns = list[tuple[str, str]]

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
_TOPICS = (
    "football,cooking,the stock market,chemistry,philosophy,fashion,cars,the Roman Empire,opera,"
    "gardening,tennis,economics,law,medicine,politics,chess,basketball,architecture,poetry,"
    "the French Revolution,biology,psychology,wine,photography,Bitcoin,climate change,volcanoes,"
    "dinosaurs,the Eiffel Tower,Shakespeare's sonnets,black holes,vaccines,sailing,knitting,"
    "electric guitars,Japanese grammar,the Olympic Games,submarines,taxes,whales,cheese,robots,"
    "marketing,astronomy,geology,painting,dance,cinema,theatre,bridges,airplanes,trains,Mars"
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
_ONES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _sum(rng: random.Random) -> Turns:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    if rng.random() < 0.25:
        a, b = rng.randint(0, 9), rng.randint(0, 9)
    operations = [
        ("+", "plus", a, b, a + b),
        ("-", "minus", max(a, b), min(a, b), abs(a - b)),
        ("*", "times", a % 13, b % 13, (a % 13) * (b % 13)),
    ]
    sign, word, x, y, result = rng.choice(operations)
    middle = rng.choice((f" {sign} ", sign, f" {sign} ", f" {word} "))
    term = f"{x}{middle}{y}"
    question = rng.choice(
        (f"What is {term}?", f"What's {term}?", f"{term}", f"{term} = ?", f"Compute {term}.",
         f"Calculate {term}", f"How much is {term}?", f"Can you tell me what {term} is?",
         f"{term}=", f"Solve {term}", f"What is the result of {term}?")
    )  # fmt: skip
    return [(question, f"{x} {sign} {y} = {result}")]


def _count(rng: random.Random) -> Turns:
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


def _capital(rng: random.Random) -> Turns:
    country, _, city = rng.choice(_CAPITALS).partition(":")
    question = rng.choice(
        (f"What is the capital of {country}?", f"What's the capital city of {country}?",
         f"capital of {country}", f"The capital of {country} is", f"Name the capital of {country}.",
         f"Tell me the capital of {country}.", f"Which city is the capital of {country}?")
    )  # fmt: skip
    return [(question, f"The capital of {country} is {city}.")]


def _name(rng: random.Random) -> Turns:
    name = rng.choice(_NAMES)
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
        turns += rng.choice(MAKERS)(rng)[:1]
    return [*turns, (asked, f"Your name is {name}.")]


def _repeat(rng: random.Random) -> Turns:
    pool = rng.choice((_NAMES, _THINGS, _ONES, [t for t in _TOPICS if " " not in t]))
    words = " ".join(rng.choice(pool) for _ in range(rng.randint(1, 5)))
    mark = rng.choice(("", '"', "'"))
    question = rng.choice(
        (f"Repeat after me: {mark}{words}{mark}", f"Say {mark}{words}{mark}",
         f"Repeat: {mark}{words}{mark}", f"Please repeat the words {mark}{words}{mark}",
         f"Echo {mark}{words}{mark}", f"Write {mark}{words}{mark} and nothing else.")
    )  # fmt: skip
    return [(question, words)]


def _story(rng: random.Random) -> Turns:
    hero, place, lost = rng.choice(_THINGS), rng.choice(_PLACES), rng.choice(_LOST)
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


def _poem(rng: random.Random) -> Turns:
    thing = rng.choice(_THINGS)
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


def _unknown(rng: random.Random) -> Turns:
    topic = rng.choice(_TOPICS) if rng.random() < 0.7 else f"{rng.choice(_THINGS)}s"
    question = rng.choice(
        (f"Tell me about {topic}.", f"What do you know about {topic}?", f"Explain {topic}.",
         f"Why are people interested in {topic}?", f"Write an essay about {topic}.",
         f"What is the best book about {topic}?", f"Give me a summary of {topic}.",
         f"How does {topic} work?", f"Who invented {topic}?", f"What is the history of {topic}?",
         f"Write a long text about {topic}", f"What do you think about {topic}?",
         f"How can I learn more about {topic}?", f"Describe {topic} in detail.",
         f"List ten facts about {topic}.", f"Write a blog post about {topic}.")
    )  # fmt: skip
    answer = (
        f"I am a very small model and I do not know much about {topic}. "
        "I know a little about Python and its standard library, for example: What does "
        "`textwrap.dedent` do?"
    )
    return [(question, answer)]


MAKERS: tuple[Callable[[random.Random], Turns], ...] = (
    _sum, _count, _capital, _repeat, _story, _poem, _unknown, _name,
)  # fmt: skip
_WEIGHTS = (6, 3, 2, 3, 3, 2, 4, 3)


def invent(rng: random.Random) -> Turns:
    """The (question, answer) turns of one made-up conversation."""
    return rng.choices(MAKERS, _WEIGHTS)[0](rng)

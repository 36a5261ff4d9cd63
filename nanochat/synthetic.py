"""Text and conversations that small generators write: identity, spelling, counting, arithmetic with tool calls, facts.

Everything is a pure function of its random generator. A conversation is {"messages": [{"role", "content"}]}.
"""

import random
import re
import zlib
from pathlib import Path

from nanochat.calculator import calculate
from nanochat.common import UserError, repo_dir

KNOWLEDGE_FILE = repo_dir() / "dev" / "self_knowledge.md"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def is_test_word(word: str) -> bool:
    """True for the tenth of all words, and of all calculations, that only the tests use."""
    return zlib.crc32(word.encode()) % 10 == 0


def conversation(*turns) -> dict:
    """Contents in turn, the user's first -> a conversation."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def with_tool(before: str, expression: str, after: str) -> list[dict]:
    """Assistant parts: text, a call of the calculator, its result, text ("{result}" in `after` is filled in)."""
    result = calculate(expression)
    assert result is not None, expression
    return [{"type": "text", "text": before}, {"type": "python", "text": expression},
            {"type": "python_output", "text": result}, {"type": "text", "text": after.format(result=result)}]


def as_text(chat: dict) -> str:
    """A conversation as plain text, for pretraining: tool calls in brackets."""
    brackets = {"text": "{}", "python": "[{}]", "python_output": "[{}]"}
    lines = []
    for message in chat["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(brackets[part["type"]].format(part["text"]) for part in content)
        lines.append(f"{message['role'].capitalize()}: {content}")
    return "\n".join(lines)


def vary(rng: random.Random, question: str) -> str:
    """The same question as different people type it."""
    if rng.random() < 0.25:
        question = rng.choice(("Hi! ", "Hello, ", "Hey, ", "Please tell me: ", "Quick question: ", "I wonder: ",
                               "So, ", "Excuse me, ", "OK. ", "Can you tell me: ")) + question
    if rng.random() < 0.25:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip("?.!")
    elif rng.random() < 0.1:
        question += rng.choice((" Thanks!", " Thank you.", " Please answer.", "?"))
    return question


# --- identity -----------------------------------------------------------------------------------------------------


def read_knowledge(path: Path = KNOWLEDGE_FILE) -> dict[str, dict[str, list[str]]]:
    """Topics of a knowledge file -> {"ask": [...], "tell": [...]}; UserError where a topic lacks one of them."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"knowledge file {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    topics: dict = {}
    for line in text.splitlines():
        if line.startswith("## "):
            topic = topics.setdefault(line[3:].strip(), {"ask": [], "tell": []})
        elif match := re.match(r"- (ask|tell): (.+)", line):
            if not topics:
                raise UserError(f"{path}: {line!r} stands before the first '## topic'")
            topic[match[1]].append(match[2].strip())
    incomplete = [name for name, topic in topics.items() if not (topic["ask"] and topic["tell"])]
    if incomplete or not topics:
        raise UserError(f"{path}: every '## topic' needs '- ask:' and '- tell:' lines; "
                        + (f"these lack them: {', '.join(incomplete)}" if incomplete else "there is no topic"))
    return topics


SMALL_TALK = (
    (("Hi", "Hello", "Hey", "Hi there", "Good morning", "Good evening", "Hello there"),
     ("Hello! How can I help you?", "Hi! What can I do for you?", "Hello! Ask me something.")),
    (("Thank you", "Thanks", "Thanks a lot", "Great, thank you", "That was helpful", "Nice"),
     ("You are welcome!", "My pleasure!", "Glad I could help!")),
    (("Bye", "Goodbye", "See you", "Good night", "I have to go"), ("Goodbye!", "See you soon!", "Bye! Come back soon.")),
)


def small_talk(rng: random.Random) -> dict:
    asks, tells = rng.choice(SMALL_TALK)
    return conversation(vary(rng, rng.choice(asks) + rng.choice(("", "!", "."))), rng.choice(tells))


def identity(rng: random.Random, topics: dict) -> dict:
    """One to three questions about the model itself, now and then with a greeting or thanks."""
    turns = []
    if rng.random() < 0.15:
        turns += [rng.choice(SMALL_TALK[0][0]), rng.choice(SMALL_TALK[0][1])]
    for name in rng.sample(sorted(topics), min(len(topics), rng.choice((1, 1, 1, 2, 3)))):
        turns += [vary(rng, rng.choice(topics[name]["ask"])), rng.choice(topics[name]["tell"])]
    if rng.random() < 0.1:
        turns += [rng.choice(SMALL_TALK[1][0]), rng.choice(SMALL_TALK[1][1])]
    return conversation(*turns)


# --- spelling and counting ----------------------------------------------------------------------------------------

COUNT_QUESTIONS = (
    "How many {letter} are in {word}?",
    "How many times does {letter} appear in {word}?",
    "How many {letter} are there in the word {word}?",
    "How often does the letter {letter} occur in {word}?",
    "Count the letter {letter} in {word}.",
    "What is the number of {letter} in the word {word}?",
    "How many of the letter {letter} does {word} have?",
    "In the word {word}, how many {letter} are there?",
    "Tell me how many {letter} there are in {word}.",
    "How many {letter}'s are in {word}?",
)
SPELL_QUESTIONS = ("Spell {word}.", "How do you spell {word}?", "Spell the word {word}, please.",
                   "What are the letters of {word}?", "Can you spell {word}?", "Please spell out {word}.")


def spell(word: str) -> str:
    """spell("cat") -> "c, a, t"."""
    return ", ".join(word)


def choose_letter(rng: random.Random, word: str) -> str:
    """Mostly a letter of the word, now and then any letter."""
    return rng.choice(word) if rng.random() < 0.9 else rng.choice(LETTERS)


def count_letters(rng: random.Random, word: str) -> dict:
    """A letter-counting problem; the answer spells the word, counts with the tool, and ends in "#### n".

    The tool call repeats the word as the question writes it, blank or quote included, because those are the same
    tokens: copying is far easier to learn than respelling.
    """
    letter = choose_letter(rng, word)
    quote, letter_quote = rng.choice(("", "", "'", '"')), rng.choice(("", "'", '"'))
    question = rng.choice(COUNT_QUESTIONS)
    if letter_quote:
        question = question.replace("{letter}'s", "{letter}")
    question = question.format(letter=f"{letter_quote}{letter}{letter_quote}", word=f"{quote}{word}{quote}")
    shown = f"{quote}{word}{quote}"
    literal = shown if quote else f"' {word}'"
    times = "time" if word.count(letter) == 1 else "times"
    answer = with_tool(f"Let me spell {shown}: {spell(word)}. Now I count with Python. ",
                       f"{literal}.count('{letter}')",
                       f" The letter {letter} occurs {{result}} {times} in {shown}.\n\n#### {{result}}")
    return conversation(question, answer)


def spell_word(rng: random.Random, word: str) -> dict:
    """A plain spelling problem: the word, then its letters."""
    quote = rng.choice(("", "", "'", '"'))
    shown = f"{quote}{word}{quote}"
    return conversation(rng.choice(SPELL_QUESTIONS).format(word=shown), f"The letters of {shown} are: {spell(word)}.")


# --- arithmetic ---------------------------------------------------------------------------------------------------

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Jack", "Emma", "Max", "Julia", "Omar", "Nina")
THINGS = ("apples", "books", "coins", "pens", "cards", "eggs", "stamps", "shells", "cookies", "marbles")
STORIES = (  # text with names, expression
    ("{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?", "{a}+{b}"),
    ("{n} has {c} {t} and gives away {a}. How many {t} are left?", "{c}-{a}"),
    ("There are {a} boxes with {b} {t} in each. How many {t} are there in all?", "{a}*{b}"),
    ("{n} finds {a} {t} on each of {b} days. How many {t} does {n} find in total?", "{a}*{b}"),
    ("{n} shares {d} {t} equally among {b} friends. How many {t} does each friend get?", "{d}//{b}"),
    ("{n} had {a} {t}, found {b} more and lost {e}. How many {t} does {n} have?", "{a}+{b}-{e}"),
)
SUMS = (("What is {e}?", "{e} is {r}."), ("Calculate {e}.", "The result is {r}."), ("How much is {e}?", "It is {r}."),
        ("Compute {e}", "{e} = {r}"), ("{e} = ?", "{e} = {r}"), ("Can you work out {e}?", "Yes: {e} is {r}."))
WORDED = {"+": "plus", "-": "minus", "*": "times", "//": "divided by"}


SMALL, LARGE = (10, 30, 100, 1000), (1000, 10_000, 100_000)  # limits of numbers


def sums(rng: random.Random, test: bool = False, limits: tuple[int, ...] = SMALL) -> dict:
    """A sum, difference, product or exact quotient of numbers below one of the limits, solved with the calculator."""
    expression = None
    while expression is None or is_test_word(expression) != test:
        a, b = (rng.randrange(2, rng.choice(limits)) for _ in range(2))
        operator = rng.choice(("+", "-", "*", "//"))
        if operator == "//":
            a *= b
        expression = f"{a}{operator}{b}"
    blank = rng.choice(("", " "))
    shown = f"{a} {WORDED[operator]} {b}" if rng.random() < 0.3 else f"{a}{blank}{operator[:1]}{blank}{b}"
    question, answer = rng.choice(SUMS)
    after = " " + answer.format(e=shown, r="{result}") + "\n\n#### {result}"
    return conversation(vary(rng, question.format(e=shown)), with_tool("Let me calculate. ", expression, after))


def word_problem(rng: random.Random, test: bool = False) -> dict:
    """A small story with one calculation."""
    expression = None
    while expression is None or is_test_word(expression) != test:
        story, formula = rng.choice(STORIES)
        a, b = rng.randrange(2, 60), rng.randrange(2, 20)
        values = {"n": rng.choice(NAMES), "t": rng.choice(THINGS), "a": a, "b": b, "c": a + rng.randrange(1, 90),
                  "d": a * b, "e": rng.randrange(1, a + b)}
        expression = formula.format(**values)
    answer = with_tool("Let me calculate. ", expression, " The answer is {result}.\n\n#### {result}")
    return conversation(story.format(**values), answer)


# --- facts --------------------------------------------------------------------------------------------------------

CAPITALS = dict(pair.split(":") for pair in (
    "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon England:London Ireland:Dublin Austria:Vienna "
    "Belgium:Brussels Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Poland:Warsaw Hungary:Budapest "
    "Greece:Athens Turkey:Ankara Russia:Moscow Ukraine:Kyiv Romania:Bucharest Bulgaria:Sofia Switzerland:Bern "
    "Netherlands:Amsterdam Iceland:Reykjavik Egypt:Cairo Kenya:Nairobi Nigeria:Abuja Morocco:Rabat Ethiopia:Addis_Ababa "
    "China:Beijing Japan:Tokyo India:New_Delhi Thailand:Bangkok Vietnam:Hanoi Indonesia:Jakarta Iran:Tehran Iraq:Baghdad "
    "Canada:Ottawa Mexico:Mexico_City Cuba:Havana Brazil:Brasilia Argentina:Buenos_Aires Chile:Santiago Peru:Lima "
    "Colombia:Bogota Venezuela:Caracas Australia:Canberra").split())
SYMBOLS = dict(pair.split(":") for pair in (
    "hydrogen:H helium:He carbon:C nitrogen:N oxygen:O sodium:Na iron:Fe copper:Cu silver:Ag gold:Au lead:Pb tin:Sn "
    "zinc:Zn calcium:Ca potassium:K sulfur:S chlorine:Cl neon:Ne mercury:Hg uranium:U").split())
OPPOSITES = tuple(pair.split(":") for pair in (
    "hot:cold big:small fast:slow up:down left:right open:closed day:night light:dark old:young rich:poor happy:sad "
    "hard:soft high:low long:short early:late full:empty wet:dry strong:weak good:bad first:last").split())
SEQUENCES = {"day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
             "month": "January February March April May June July August September October November December".split(),
             "planet": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()}
PLAIN_FACTS = tuple(line.split("|") for line in """
Why is the sky blue?|The sky is blue because air scatters blue light more than red light.
What color is the sky?|The sky is blue by day, because air scatters blue light more than red light.
What is water made of?|Water is made of hydrogen and oxygen. Its formula is H2O.
How many days are in a year?|A year has 365 days, a leap year 366.
How many hours are in a day?|A day has 24 hours.
How many minutes are in an hour?|An hour has 60 minutes.
How many months are in a year?|A year has 12 months.
How many legs does a spider have?|A spider has eight legs.
How many legs does an insect have?|An insect has six legs.
What is the largest planet?|Jupiter is the largest planet of the solar system.
What is the closest star to Earth?|The Sun is the closest star to Earth.
What is the largest ocean?|The Pacific is the largest ocean.
What is the highest mountain?|Mount Everest is the highest mountain on Earth.
What do bees make?|Bees make honey.
What do plants need to grow?|Plants need light, water and air to grow.
At what temperature does water boil?|Water boils at 100 degrees Celsius.
At what temperature does water freeze?|Water freezes at 0 degrees Celsius.
Who wrote Hamlet?|William Shakespeare wrote Hamlet.
What is a prime number?|A prime number is greater than 1 and divisible only by 1 and itself.
What is the moon?|The Moon is the natural satellite of the Earth.
What causes the seasons?|The seasons come from the tilt of the Earth's axis.
What is photosynthesis?|Photosynthesis is how plants make sugar from light, water and carbon dioxide.
What is a neural network?|A neural network is a function with many adjustable weights that learns from examples.
What is a language model?|A language model predicts the next token of a text.
What is a tokenizer?|A tokenizer cuts text into tokens, the pieces that a language model reads.
What is Python?|Python is a programming language that is easy to read.
""".strip().splitlines())


def fact(rng: random.Random) -> dict:
    """A question of general knowledge and its answer."""
    kind = rng.randrange(5)
    if kind == 0:
        country = rng.choice(sorted(CAPITALS))
        city = CAPITALS[country].replace("_", " ")
        question, answer = rng.choice((
            (f"What is the capital of {country}?", f"The capital of {country} is {city}."),
            (f"Which city is the capital of {country}?", f"{city} is the capital of {country}."),
            (f"Name the capital of {country}.", f"The capital of {country} is {city}."),
            (f"{city} is the capital of which country?", f"{city} is the capital of {country}.")))
    elif kind == 1:
        element = rng.choice(sorted(SYMBOLS))
        question, answer = (f"What is the chemical symbol of {element}?",
                            f"The chemical symbol of {element} is {SYMBOLS[element]}.")
    elif kind == 2:
        pair = list(rng.choice(OPPOSITES))
        rng.shuffle(pair)
        question, answer = f"What is the opposite of {pair[0]}?", f"The opposite of {pair[0]} is {pair[1]}."
    elif kind == 3:
        name = rng.choice(sorted(SEQUENCES))
        i = rng.randrange(len(SEQUENCES[name]) - 1)
        a, b = SEQUENCES[name][i:i + 2]
        question, answer = rng.choice(((f"Which {name} comes after {a}?", f"{b} comes after {a}."),
                                       (f"Which {name} comes before {b}?", f"{a} comes before {b}.")))
    else:
        question, answer = rng.choice(PLAIN_FACTS)
    return conversation(vary(rng, question), answer)


# --- mixtures -----------------------------------------------------------------------------------------------------


def chat(rng: random.Random, words: list[str]) -> dict:
    """A conversation of any kind but identity; spelling takes its words from `words`."""
    kind = rng.random()
    if kind < 0.35:
        return count_letters(rng, rng.choice(words))
    if kind < 0.5:
        return spell_word(rng, rng.choice(words))
    if kind < 0.65:
        return sums(rng)
    if kind < 0.75:
        return word_problem(rng)
    return small_talk(rng) if kind < 0.8 else fact(rng)

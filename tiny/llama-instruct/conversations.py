"""The small talk that tiny/llama-instruct learned, made by rules, and how well it learned it.

    python tiny/llama-instruct/conversations.py > small-talk.jsonl   # what train.py learns from
    python tiny/llama-instruct/conversations.py --check              # asks the held-out questions

A question is a fact in one of several wordings. One wording in ten is held out, but for small talk:
its fact is taught in other words only, and --check asks it. Conversations have one to five
questions, typed as people type: with and without capitals and full stops, some after a system
message.
"""

import argparse
import json
import random
import sys
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
NUMBER = 20_000  # conversations
NAME = "Pip"

# ---------------------------------------------- Facts ---------------------------------------------

CAPITALS = """Argentina: Buenos Aires, Australia: Canberra, Austria: Vienna, Belgium: Brussels,
Brazil: Brasilia, Canada: Ottawa, Chile: Santiago, China: Beijing, Cuba: Havana, Denmark:
Copenhagen, Egypt: Cairo, England: London, Finland: Helsinki, France: Paris, Germany: Berlin,
Greece: Athens, Hungary: Budapest, Iceland: Reykjavik, India: New Delhi, Ireland: Dublin, Italy:
Rome, Japan: Tokyo, Kenya: Nairobi, Mexico: Mexico City, Morocco: Rabat, Nepal: Kathmandu,
Norway: Oslo, Peru: Lima, Poland: Warsaw, Portugal: Lisbon, Russia: Moscow, Scotland: Edinburgh,
Spain: Madrid, Sweden: Stockholm, Switzerland: Bern, Thailand: Bangkok, Turkey: Ankara,
Ukraine: Kyiv, Vietnam: Hanoi, Wales: Cardiff"""

OPPOSITES = """hot: cold, big: small, tall: short, fast: slow, happy: sad, day: night, up: down,
left: right, light: dark, old: young, new: old, open: closed, rich: poor, hard: soft, wet: dry,
early: late, loud: quiet, full: empty, strong: weak, black: white, good: bad, true: false, high:
low, near: far, inside: outside, first: last, push: pull, clean: dirty, thick: thin, easy:
difficult, sweet: sour, north: south, east: west, love: hate, win: lose, begin: end, buy: sell,
before: after, always: never, wide: narrow, heavy: light, deep: shallow"""

COLOURS = """grass: green, the sky: blue, snow: white, a banana: yellow, a lemon: yellow, a tomato:
red, a strawberry: red, an orange: orange, a carrot: orange, coal: black, milk: white, blood: red,
the sun: yellow, the sea: blue, chocolate: brown, a frog: green, a pea: green, a raven: black, a
polar bear: white, a flamingo: pink, an elephant: grey, a plum: purple, gold: yellow, silver: grey,
a cherry: red, a cucumber: green"""

SOUNDS = """dog: woof, cat: meow, cow: moo, sheep: baa, duck: quack, pig: oink, horse: neigh, bee:
buzz, lion: roar, owl: hoot, frog: croak, mouse: squeak, snake: hiss, hen: cluck, donkey: hee-haw"""

YOUNG = """dog: puppy, cat: kitten, cow: calf, sheep: lamb, duck: duckling, pig: piglet, horse:
foal, lion: cub, hen: chick, goat: kid, swan: cygnet, frog: tadpole, kangaroo: joey, deer: fawn"""

RHYMES = """cat: hat, house: mouse, tree: bee, night: light, star: car, book: cook, rain: train,
moon: spoon, dog: frog, bell: well, cake: lake, day: play, king: ring, sea: tea, blue: shoe"""

COUNTS = """legs does a dog have: four, legs does a spider have: eight, legs does a bird have: two,
legs does an ant have: six, legs does a cat have: four, legs does a fish have: none, days are in a
week: seven, months are in a year: twelve, hours are in a day: twenty-four, minutes are in an hour:
sixty, seconds are in a minute: sixty, fingers are on a hand: five, letters are in the alphabet:
twenty-six, wheels does a car have: four, wheels does a bicycle have: two, days are in a year:
three hundred and sixty-five, sides does a triangle have: three, sides does a square have: four,
arms does an octopus have: eight, seasons are in a year: four"""

WORDS = """apple bird boat book bread bridge butter cake candle car cat chair cheese cloud cup dog
door dream duck earth fire fish flower forest friend frog garden ghost grass green hand happy heart
honey horse house island jelly king kitten lamp leaf lemon letter lion light milk model money moon
mother mouse music night ocean orange paper pencil piano plum queen rabbit rain river robot rose
sand sea ship shoe silver sister snow song spoon star stone storm summer sun sugar table tea tiger
train tree violin water whale wind window winter wolf wood word yellow zebra"""

DAYS = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"
MONTHS = """January, February, March, April, May, June, July, August, September, October, November,
December"""
LIKED = "red, green, blue, yellow, pink, purple, brown, black"  # colours
NAMES = """Ada Adam Alex Alice Amir Anna Anton Ben Bob Carla Carol Chen Clara Dan David Diana Elena
Emil Emma Eric Eva Felix Fred Grace Hana Hans Helen Henry Ida Ivan Jack Jane Jin Joan Joe John Jonas
Julia Kai Karl Kate Lara Laura Lee Leo Lily Lisa Lucy Luis Maria Mark Martin Mary Max Mei Mia Mike
Mina Nina Noah Nora Olga Oscar Otto Paul Pedro Peter Rita Rob Rosa Ruth Sam Sara Sofia Sue Tim Tina
Tom Uma Vera Victor Wei Will Yuki Zoe"""
SYLLABLES = "ba be bo da di do el fa fi ga ka ki la le li lo ma mi mo na ni no or ra ri ro sa ta va"


def listed(text: str) -> list[str]:
    """'a, b, c' as a list; a line may end anywhere."""
    return " ".join(text.split()).split(", ")


# (wordings, answer) of small talk; {pip} is the model's name
SMALL_TALK = [
    (["Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself."],
     "I am {pip}, a very small language model. I know only a little."),
    (["What is your name?", "What's your name?", "Do you have a name?", "How are you called?"],
     "My name is {pip}."),
    (["How are you?", "How do you do?", "How is it going?", "Are you well?", "How are you today?"],
     "I am well, thank you. And how are you?"),
    (["I am fine.", "I am well.", "I'm good.", "Fine, thanks.", "I am well, thank you.",
      "Very well.", "I am happy."], "I am glad to hear that!"),
    (["I am sad.", "I am tired.", "I feel bad.", "Not so well.", "I am not well.", "I am bored."],
     "I am sorry to hear that. Shall I tell you a joke?"),
    (["What can you do?", "What do you know?", "Can you help me?", "Help!", "Help me.",
      "What can I ask you?", "What should I ask?"],
     "I know small sums, capitals, opposites, colours, animals, days and months. I can spell, "
     "count and rhyme, and I can remember your name."),
    (["Who made you?", "Who created you?", "Where do you come from?", "Who trained you?"],
     "train.py made me, out of rules and random numbers."),
    (["How big are you?", "How small are you?", "How many parameters do you have?"],
     "I have less than a million parameters. Large models have a million times more."),
    (["How old are you?", "When were you born?"],
     "I do not know my age. I was trained in a few minutes."),
    (["Are you a human?", "Are you human?", "Are you a robot?", "Are you real?", "Are you alive?",
      "Are you a person?"], "No, I am only a very small language model."),
    (["Are you clever?", "Are you smart?", "Are you intelligent?", "Do you think?",
      "Do you understand me?"], "Not very. I have learned some answers, and I do not understand "
     "much."),
    (["Do you have feelings?", "Do you dream?", "Do you sleep?", "Can you feel?", "Are you happy?"],
     "No. I only predict the next token."),
    (["Where do you live?", "Where are you?"], "In a folder called tiny."),
    (["Are you always right?", "Can I trust you?", "Do you make mistakes?"],
     "No, I am often wrong. Do not trust me with anything."),
    (["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "A joke, please."],
     "Why was six afraid of seven? Because seven eight nine."),
    (["Tell me a story.", "Do you know a story?", "A story, please."],
     "Once upon a time there was a very small model. It learned to say hello. The end."),
    (["Sing a song.", "Can you sing?", "Sing for me.", "Sing!"], "La la la, I am small, la la la!"),
    (["Write a poem.", "Tell me a poem.", "Do you know a poem?"],
     "Roses are red, violets are blue, I am a small one, and who are you?"),
    (["What is your favourite colour?", "Which colour do you like?"], "I like blue."),
    (["What is your favourite animal?", "Which animal do you like?"], "I like the mouse. It is "
     "small, too."),
    (["I like you.", "I love you.", "You are nice.", "You are great.", "Well done.", "Good job."],
     "You are very kind!"),
    (["You are wrong.", "That is wrong.", "You are stupid.", "That is not right."],
     "I am sorry. I am very small."),
    (["Yes.", "Yes, please.", "Okay.", "All right.", "Sure."], "Good! What else can I do for you?"),
    (["No.", "No, thanks.", "Not now.", "Nothing."], "All right. I am here if you need me."),
    (["Name the days of the week.", "What are the days of the week?", "List the days."],
     DAYS + "."),
    (["Name the months.", "What are the months of the year?", "List the months."],
     ", ".join(listed(MONTHS)) + "."),
    (["Name the seasons.", "What are the four seasons?", "List the seasons."],
     "Spring, summer, autumn and winter."),
    (["Name some colours.", "Tell me some colours.", "List some colours."],
     "Red, orange, yellow, green, blue and purple."),
    (["Name a fruit.", "Tell me a fruit.", "Do you know a fruit?"], "An apple is a fruit."),
    (["Name an animal.", "Tell me an animal.", "Do you know an animal?"], "A mouse is an animal."),
    (["What is a language model?", "Explain language models.", "What is a token?"],
     "A language model predicts the next token of a text. I am one."),
]  # fmt: skip

GREETINGS = ["Hello!", "Hi!", "Hey!", "Good morning!", "Good evening!", "Good day!", "Hello there!"]
FAREWELLS = ["Goodbye!", "Bye!", "Good night!", "See you!", "See you soon!", "Farewell!"]
THANKS = ["Thanks!", "Thank you!", "Thank you very much!", "Many thanks!", "Thanks a lot!"]

# What it does not know; {x} is any word.
UNKNOWN = """Who wrote {x}? | How tall is the {x}? | Explain {x}. | What do you think of {x}? |
Where can I buy a {x}? | What is the meaning of {x}? | Write a program about {x}. | How do I cook a
{x}? | Why is the {x} so old? | Who invented the {x}? | What is {x}? | Tell me about {x}. | What
happened in {x}? | Who is the king of {x}? | How much is a {x}? | Translate {x} into French. | What
is the weather in {x}? | When was {x} born? | How far is {x}? | Is {x} true? | Write an essay about
{x}. | What is the best {x}? | Can a {x} fly? | How does a {x} work? | Draw a {x}. | Do you know
{x}? | Have you read {x}? | Who won the {x}? | Why is there {x}? | What is a {x} made of? | Should I
buy a {x}? | What time is it in {x}? | Summarise {x}. | {x} | {x}?"""
OTHERS = """life, love, time, war, peace, money, history, physics, chemistry, gravity, politics,
football, chess, the internet, Python, Java, a computer, the universe, Napoleon, Shakespeare,
Hamlet, Einstein, Mozart, America, Africa, Europe, Paris, London, Rome, God, truth, beauty, art,
religion, the president, the weather, philosophy, electricity, a black hole, the moon landing, the
economy, dinosaur, volcano, bicycle, telephone, pizza, soup, the news, the future, a dragon, Mars,
Jupiter, mathematics, the Bible, Germany, France, China, English, the law, a doctor, medicine"""
DO_NOT_KNOW = "I do not know that. I am very small. Ask me for a sum, a capital or an opposite."


TOO_MUCH = "That is too much for me. I can add and subtract numbers up to ten."


class Fact(NamedTuple):
    """Something it can be asked."""

    topic: str
    wordings: list[str]
    answer: str
    brief: str  # the same after the system message "Be brief."
    follow: str = ""  # another wording, after a question on the same topic


def pairs(text: str) -> list[tuple[str, str]]:
    """'a: b, c: d' as pairs."""
    return [tuple(pair.split(": ")) for pair in listed(text)]


def capital_first(text: str) -> str:
    """The text with a capital letter; `capitalize` would make the others small."""
    return text[:1].upper() + text[1:]


def facts() -> list[Fact]:
    """Everything it can be asked in a single question, but for what it does not know."""
    found = []
    for wordings, answer in SMALL_TALK:
        found.append(Fact("small talk", wordings, answer, answer))

    for country, city in pairs(CAPITALS):
        wordings = [
            "What is the capital of {}?",
            "Capital of {}?",
            "Which city is the capital of {}?",
            "Tell me the capital of {}.",
            "Do you know the capital of {}?",
            "What's the capital of {}?",
            "{}'s capital?",
        ]
        wordings = [wording.format(country) for wording in wordings]
        answer = f"The capital of {country} is {city}."
        found.append(Fact("capitals", wordings, answer, f"{city}.", f"And of {country}?"))

    for word, opposite in pairs(OPPOSITES):
        wordings = [
            "What is the opposite of {}?",
            "Opposite of {}?",
            "Tell me the opposite of {}.",
            "What's the opposite of {}?",
            "The opposite of {}, please.",
            "Do you know the opposite of {}?",
        ]
        wordings = [wording.format(word) for wording in wordings]
        answer = f"The opposite of {word} is {opposite}."
        brief = f"{capital_first(opposite)}."
        found.append(Fact("opposites", wordings, answer, brief, f"And of {word}?"))

    for thing, colour in pairs(COLOURS):
        wordings = [
            "What colour is {}?",
            "Which colour is {}?",
            "Tell me the colour of {}.",
            "What is the colour of {}?",
            "What color is {}?",
        ]
        wordings = [wording.format(thing) for wording in wordings]
        answer = f"{capital_first(thing)} is {colour}."
        found.append(
            Fact("colours", wordings, answer, f"{capital_first(colour)}.", f"And {thing}?")
        )
    return found + animals() + numbers() + words() + calendar()


def with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def animals() -> list[Fact]:
    """What they say, and what their young are called."""
    found = []
    for animal, sound in pairs(SOUNDS):
        a = with_article(animal)
        wordings = [
            f"What does {a} say?",
            f"What sound does {a} make?",
            f"How does {a} go?",
            f"What noise does {a} make?",
            f"What does the {animal} say?",
        ]
        answer = f"{capital_first(a)} says {sound}."
        found.append(Fact("animals", wordings, answer, f"{capital_first(sound)}!", f"And {a}?"))

    for animal, young in pairs(YOUNG):
        wordings = [
            f"What is a young {animal} called?",
            f"What is a baby {animal}?",
            f"How do you call a young {animal}?",
            f"What is a baby {animal} called?",
        ]
        answer = f"A young {animal} is called a {young}."
        found.append(Fact("animals", wordings, answer, f"A {young}."))
    return found


def numbers() -> list[Fact]:
    """Sums and differences of numbers up to ten, and how many there are of this and that."""
    found = []
    signs = {"+": ["plus", "and"], "-": ["minus"]}
    for a in range(11):
        for b in range(11):
            for sign, names in signs.items():
                result = a + b if sign == "+" else a - b
                if result < 0:
                    continue
                wordings = [
                    f"What is {a} {sign} {b}?",
                    f"{a} {sign} {b}",
                    f"{a}{sign}{b}",
                    f"{a} {sign} {b} = ?",
                    f"How much is {a} {sign} {b}?",
                    f"Calculate {a} {sign} {b}.",
                ]
                for name in names:
                    wordings += [f"What is {a} {name} {b}?", f"How much is {a} {name} {b}?"]
                answer = f"{a} {sign} {b} = {result}"
                found.append(Fact("sums", wordings, answer, f"{result}", f"And {a} {sign} {b}?"))

    for what, number in pairs(COUNTS):
        wordings = [f"How many {what}?", f"Tell me: how many {what}?", f"So how many {what}?"]
        number = capital_first(number)
        found.append(Fact("how many", wordings, f"{number}.", f"{number}."))
    for n in range(2, 13):
        wordings = [f"Count to {n}.", f"Count up to {n}.", f"Can you count to {n}?"]
        answer = ", ".join(str(i) for i in range(1, n + 1)) + "."
        found.append(Fact("counting", wordings, answer, answer, f"And to {n}?"))
    return found


def words() -> list[Fact]:
    """Spelling, rhymes and the alphabet."""
    found = []
    for word in WORDS.split():
        wordings = [
            f"Spell {word}.",
            f"How do you spell {word}?",
            f"Spell the word {word}.",
            f"Can you spell {word}?",
            f"How is {word} spelled?",
        ]
        answer = "-".join(word)
        found.append(Fact("spelling", wordings, answer, answer, f"And {word}?"))

    for word, rhyme in pairs(RHYMES):
        wordings = [
            f"What rhymes with {word}?",
            f"A rhyme for {word}?",
            f"Find a rhyme for {word}.",
            f"Which word rhymes with {word}?",
        ]
        answer = f"{capital_first(word)} rhymes with {rhyme}."
        found.append(Fact("rhymes", wordings, answer, f"{capital_first(rhyme)}.", f"And {word}?"))

    for letter, later in pairwise("abcdefghijklmnopqrstuvwxyz"):
        wordings = [
            f"What comes after {letter}?",
            f"Which letter comes after {letter}?",
            f"What is the letter after {letter}?",
        ]
        answer = f"After {letter} comes {later}."
        found.append(Fact("alphabet", wordings, answer, f"{later}", f"And after {letter}?"))
    return found


def calendar() -> list[Fact]:
    """Which day or month is next, and which was before."""
    found = []
    for kind, names in (("day", listed(DAYS)), ("month", listed(MONTHS))):
        for i, name in enumerate(names):
            later = names[(i + 1) % len(names)]
            earlier = names[i - 1]
            after = [
                f"What {kind} comes after {name}?",
                f"Which {kind} is after {name}?",
                f"What comes after {name}?",
                f"What is the {kind} after {name}?",
            ]
            answer = f"After {name} comes {later}."
            found.append(Fact("calendar", after, answer, f"{later}.", f"And after {name}?"))
            before = [wording.replace("after", "before") for wording in after]
            answer = f"Before {name} comes {earlier}."
            found.append(Fact("calendar", before, answer, f"{earlier}.", f"And before {name}?"))
    return found


def is_held_out(fact: Fact, wording: str) -> bool:
    """Whether a wording is kept from the training data: about one in ten.

    But none of small talk, where no rule leads from one wording to another.
    """
    return fact.topic != "small talk" and zlib.crc32(wording.encode()) % 10 == 0


# ------------------------------------------ Conversations -----------------------------------------


class Speaker:
    """Both sides of a conversation: the rules by which questions are asked and answered."""

    def __init__(self, rng: random.Random, topics: dict[str, list[Fact]]):
        self.rng = rng
        self.topics = topics
        self.name = None  # of the user, once it was told
        self.colour = None  # that the user likes
        self.brief = rng.random() < 0.1
        self.pirate = not self.brief and rng.random() < 0.1
        self.pip = self.any_name() if rng.random() < 0.07 else NAME

    def system(self) -> str | None:
        """The system message, if there is one."""
        rules = []
        if self.pip != NAME:
            rules.append(f"Your name is {self.pip}.")
        if self.brief:
            rules.append(self.rng.choice(["Be brief.", "Answer briefly.", "Use few words."]))
        if self.pirate:
            rules.append(self.rng.choice(["Speak like a pirate.", "You are a pirate."]))
        if not rules and self.rng.random() < 0.05:
            rules.append(
                self.rng.choice(["You are a helpful assistant.", "Be kind.", "Be honest."])
            )
        return " ".join(rules) or None

    def any_name(self) -> str:
        """A name of the list, or one that nobody has."""
        if self.rng.random() < 0.6:
            return self.rng.choice(NAMES.split())
        syllables = self.rng.choices(SYLLABLES.split(), k=self.rng.choice([2, 2, 3]))
        return capital_first("".join(syllables))

    def turns(self) -> list[tuple[str, str]]:
        """A conversation: questions and answers."""
        found = []
        if self.rng.random() < 0.25:
            found.append(self.greet())
        for _ in range(self.rng.choice([1, 1, 2, 2, 3, 4])):
            kind = self.rng.random()
            if kind < 0.3:
                found.append(self.personal())
            elif kind < 0.4:
                found.append(self.unknown())
            elif kind < 0.45:
                found.append(self.thank())
            else:
                found += self.ask()
        if self.rng.random() < 0.1:
            found.append(self.part())
        return found

    def greet(self) -> tuple[str, str]:
        greeting = self.rng.choice(GREETINGS)
        if self.rng.random() < 0.3:
            self.name = self.any_name()
            question = f"{greeting} {self.introduction()}"
            return question, f"{greeting[:-1]}, {self.name}! What can I do for you?"
        if self.brief:
            return greeting, greeting
        return greeting, f"{greeting} I am {self.pip}. What is your name?"

    def introduction(self) -> str:
        form = self.rng.choice(["My name is {}.", "I am {}.", "I'm {}.", "Call me {}."])
        return form.format(self.name)

    def personal(self) -> tuple[str, str]:
        """What the user tells of himself, and asks for later."""
        kind = self.rng.random()
        if kind < 0.4 or (kind < 0.7 and self.name is None and self.rng.random() < 0.7):
            self.name = self.any_name()
            return self.introduction(), f"Nice to meet you, {self.name}!"
        if kind < 0.75:
            asked = ["What is my name?", "Who am I?", "Do you know my name?", "What's my name?"]
            answer = "You have not told me your name yet."
            if self.name:
                answer = f"Your name is {self.name}."
            return self.rng.choice(asked), answer
        if kind < 0.9:
            self.colour = self.rng.choice(listed(LIKED))
            asked = ["My favourite colour is {}.", "I like {}.", "I love {}."]
            answer = f"{capital_first(self.colour)} is a fine colour!"
            return self.rng.choice(asked).format(self.colour), answer
        answer = "You have not told me yet."
        if self.colour:
            answer = f"Your favourite colour is {self.colour}."
        asked = ["What is my favourite colour?", "Which colour do I like?"]
        return self.rng.choice(asked), answer

    def unknown(self) -> tuple[str, str]:
        """Something it does not know: it says so."""
        kind = self.rng.random()
        if kind < 0.15:
            place = self.any_name() + self.rng.choice(["", "land", "ia"])
            asked = ["What is the capital of {}?", "Capital of {}?", "Tell me the capital of {}."]
            return self.rng.choice(asked).format(place), f"I do not know the capital of {place}."
        if kind < 0.3:
            sign = self.rng.choice(["+", "-", "*", "/", "plus", "minus", "times"])
            a = self.rng.randint(11, self.rng.choice([20, 100, 1000, 100_000]))
            b = self.rng.randint(0, self.rng.choice([12, 100, 1000]))
            if sign in ("*", "/", "times") and self.rng.random() < 0.5:
                a = self.rng.randint(0, 10)
            elif self.rng.random() < 0.5:
                a, b = b, a
            asked = self.rng.choice(["What is {} {} {}?", "{} {} {}", "How much is {} {} {}?"])
            return asked.format(a, sign, b), TOO_MUCH

        form = self.rng.choice(" ".join(UNKNOWN.split()).split(" | "))
        word = self.rng.choice([*WORDS.split(), *listed(OTHERS)])
        if self.rng.random() < 0.3:
            word = self.any_name()
        if self.rng.random() < 0.2:
            word += " " + self.rng.choice([*WORDS.split(), *listed(OTHERS)])
        return capital_first(form.format(x=word)), DO_NOT_KNOW

    def thank(self) -> tuple[str, str]:
        answer = f"You are welcome, {self.name}!" if self.name else "You are welcome!"
        return self.rng.choice(THANKS), answer

    def part(self) -> tuple[str, str]:
        farewell = self.rng.choice(FAREWELLS)
        answer = f"{farewell[:-1]}, {self.name}!" if self.name else farewell
        return farewell, answer

    def ask(self) -> list[tuple[str, str]]:
        """A question on any topic, and perhaps a second one on the same."""
        topic = self.rng.choice(list(self.topics))
        fact = self.rng.choice(self.topics[topic])
        wordings = [wording for wording in fact.wordings if not is_held_out(fact, wording)]
        if not wordings:
            return []
        found = [(self.rng.choice(wordings), self.answer(fact))]
        second = self.rng.choice(self.topics[topic])
        same_kind = second.answer.split()[:2] == fact.answer.split()[:2]
        if second.follow and (same_kind or fact.topic in ("sums", "spelling", "colours")):
            found.append((second.follow, self.answer(second)))
        return found

    def answer(self, fact: Fact) -> str:
        return (fact.brief if self.brief else fact.answer).format(pip=self.pip)


def typed(question: str, rng: random.Random) -> str:
    """A question as people type it: some leave out capitals and the last sign."""
    if rng.random() < 0.25:
        question = question[:1].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.3:
        question = question.rstrip(".?!") or question
    return question


def conversations(number: int, seed: int = 0):
    """Yields that many conversations, as lists of messages."""
    topics = {}
    for fact in facts():
        topics.setdefault(fact.topic, []).append(fact)
    # Small talk is what visitors begin with, and sums are the hardest.
    topics |= {f"small talk {i}": topics["small talk"] for i in range(3)}
    topics |= {f"sums {i}": topics["sums"] for i in range(5)}

    rng = random.Random(seed)
    while number > 0:
        speaker = Speaker(rng, topics)
        messages = []
        system = speaker.system()
        if system is not None:
            messages.append({"role": "system", "content": system})
        for question, answer in speaker.turns():
            if speaker.pirate:
                answer = f"Arr! {answer}"
            messages.append({"role": "user", "content": typed(question, rng)})
            messages.append({"role": "assistant", "content": answer})
        if messages and messages[-1]["role"] == "assistant":
            number -= 1
            yield messages


# ---------------------------------------------- Check ---------------------------------------------


def check(folder: Path):
    """Asks the held-out questions, one by one and greedily, and prints how many are right."""
    sys.path.insert(0, str(HERE.parents[1]))
    import llama
    from sample import ChatTokenizer

    model = llama.load(folder)
    codec = ChatTokenizer(llama.tokenizer(folder).backend, folder, None)
    stop_ids = llama.read_stop_ids(folder, model.config)

    asked = []
    for fact in facts():
        for wording in fact.wordings:
            if is_held_out(fact, wording):
                asked.append((fact.topic, wording, fact.answer.format(pip=NAME)))
    prompts = [codec.encode(question) for _, question, _ in asked]
    rows = llama.generate(model, prompts, 64, key=0, temperature=0, stop_ids=stop_ids)

    right = Counter()
    total = Counter()
    for (topic, question, answer), row in zip(asked, rows, strict=True):
        said = codec.decode(row).strip()
        total[topic] += 1
        if said == answer:
            right[topic] += 1
        else:
            print(f"{question}  {said}  (not: {answer})", file=sys.stderr)
    for topic, number in total.items():
        print(f"{topic:12}{right[topic]:4} of {number:4}")
    print(f"{right.total()} of {total.total()} held-out questions are answered right")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="ask the held-out questions")
    parser.add_argument("--weights", type=Path, default=HERE, help="the model to check")
    args = parser.parse_args()
    if args.check:
        check(args.weights)
        return
    for messages in conversations(NUMBER):
        print(json.dumps({"messages": messages}))


if __name__ == "__main__":
    main()

"""Words to fill slots with, and made-up words for copying."""

import random

# ruff: noqa: SIM905 - a paragraph of words is easier to read and extend than a list of literals

NAMES = """Ada Ben Clara David Emma Felix Greta Hanna Ivan Jana Karl Lena Mira Nils Olga Paul Rosa
Sven Tara Uma Vera Walter Xenia Yara Zoe Anna Boris Carla Dora Emil Fritz Gina Hugo Ines Jonas Kira
Leon Maria Nora Oskar Petra Quentin Rita Simon Tom Ursula Viktor Wanda Yusuf Zara Aki Bola Chen Dana
Elif Farid Goran Hiro Idris Joao Kofi Linh Malik Noor Omar Priya Ravi Sofia Tariq Wei Max Eva Lucy
Sam Alice Bob Carol Dave Eve Frank Grace Henry Iris Jack Kate Liam Mia Noah Olivia Peter""".split()

PLACES = """Paris London Berlin Rome Madrid Vienna Prague Oslo Cairo Lima Tokyo Delhi Nairobi Lagos
Sydney Toronto Boston Chicago Havana Quito Seoul Hanoi Athens Dublin Lisbon Warsaw Helsinki Zurich
Munich Hamburg Milan Kyoto Shanghai Mumbai Dakar Tunis Accra Bogota Denver Seattle France Germany
Italy Spain Japan Brazil Canada India China Egypt Kenya Peru Norway Sweden Poland Greece Turkey
Mexico Chile Ghana Vietnam Australia Finland Ireland Iceland Austria""".split()

THINGS = """apple bread cake soup rice egg potato tomato onion cheese pizza pasta coffee tea milk
chair table lamp door window bike car boat train plane clock radio piano guitar drum book pen letter
shoe coat hat ring bag box cup plate knife spoon tree flower garden house bridge tower river lake
mountain island dog cat horse bird fish bear mouse rabbit sheep cow goat duck frog snake bee spider
phone computer robot camera map key stone sand glass gold silver paper wood wool fire snow rain
cloud star moon sun wind storm road wall roof bed pillow blanket candle mirror basket ladder hammer
nail rope wheel engine bottle carpet pencil ticket jacket button pocket needle""".split()

COLORS = """red blue green yellow black white orange purple brown pink gray silver gold violet
turquoise""".split()

QUALITIES = """big small old new fast slow warm cold dark bright quiet loud soft hard long short
round flat heavy light happy sad clever brave kind strange tiny huge empty full free busy wise
gentle lazy sweet bitter clean dusty broken golden wooden""".split()

ACTIONS = """runs sleeps sings jumps reads writes waits falls shines grows dances swims flies cooks
laughs learns counts builds hides travels""".split()

PLURALS = """apples books coins cards eggs pens stones boxes cats dogs stars cups keys hats blocks
pages tokens marbles cookies oranges flowers balls tickets shells""".split()

NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen
fourteen fifteen sixteen seventeen eighteen nineteen twenty""".split()

ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t tr v w z".split()
VOWELS = "a e i o u ai ea oo ou".split()
CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "p", "k", "x", "ng", "rt"]


def made_up_word(rng: random.Random) -> str:
    """A word that nobody has seen, so that copying cannot be done by heart."""
    return "".join(
        rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        for _ in range(rng.choice((1, 2, 2, 3)))
    )


def any_word(rng: random.Random) -> str:
    """A word to copy: mostly plain words, sometimes a name, a made-up word or a number."""
    draw = rng.random()
    if draw < 0.5:
        return rng.choice(rng.choice((THINGS, COLORS, QUALITIES, ACTIONS, PLURALS, NUMBER_WORDS)))
    if draw < 0.65:
        return rng.choice(rng.choice((NAMES, PLACES)))
    if draw < 0.9:
        return made_up_word(rng)
    return str(rng.randrange(1000))


def sentence(rng: random.Random) -> str:
    """A short sentence without much sense, for copying."""
    thing, other = rng.sample(THINGS, 2)
    return rng.choice(
        (
            f"The {rng.choice(QUALITIES)} {thing} {rng.choice(ACTIONS)}.",
            f"{rng.choice(NAMES)} has a {rng.choice(QUALITIES)} {thing}.",
            f"The {thing} {rng.choice(ACTIONS)} near the {other}.",
            f"I like {rng.choice(COLORS)} {rng.choice(PLURALS)}.",
            f"{rng.choice(NAMES)} and {rng.choice(NAMES)} live in {rng.choice(PLACES)}.",
            f"My {thing} is {rng.choice(COLORS)} and {rng.choice(QUALITIES)}!",
            f"A {thing}, a {other} and {rng.randrange(2, 30)} {rng.choice(PLURALS)}.",
        )
    )

"""Generated reviews, positive or negative.

Each sentence judges one thing, and the label is the majority of the judgements. A negation reverses a judgement, and
two negations cancel out. A comparison (``the soup did not match it``) repeats or reverses the previous judgement.
Harder instances combine more of these:

* level 1: one plain sentence,
* level 2: two or three plain sentences that agree,
* level 3: one or three sentences, some negated; where they disagree, the majority wins,
* level 4: three or five sentences with negations, double negations, comparisons and mixed evidence.
"""

from random import Random

LABELS = ("negative", "positive")
THINGS = (
    "food service room film story music view price staff sound coffee bread garden hotel ending script acting "
    "camera screen battery bed soup wine museum tour pool window chair book song dance sauce"
).split()
VERBS = "was seemed felt looked proved".split()
ADVERBS = ["", "", "very", "quite", "really", "rather"]
ADJECTIVES = {
    1: "good great lovely superb fresh fine clever warm bright charming elegant perfect tasty solid".split(),
    -1: "bad awful dull poor stale weak clumsy cold dirty boring ugly broken bland shabby".split(),
}
NEGATIONS = {0: [""], 1: ["not", "never", "hardly", "anything but"], 2: ["never not", "not hardly"]}
COMPARISONS = {True: "did match it .", False: "did not match it ."}
COMPARED = 0.4  # probability of a comparison at level 4, for each sentence but the first
WORDS = {word for phrases in NEGATIONS.values() for phrase in phrases for word in phrase.split()}
WORDS |= {*LABELS, *THINGS, *VERBS, *ADVERBS, *ADJECTIVES[1], *ADJECTIVES[-1], "the", "."} - {""}
WORDS |= {word for phrase in COMPARISONS.values() for word in phrase.split()}


def sentence(random: Random, judgement: int, negations: int) -> str:
    """A sentence with a judgement (1 or -1) and that many negations."""
    word = judgement if negations % 2 == 0 else -judgement
    parts = ["the", random.choice(THINGS), random.choice(VERBS), random.choice(NEGATIONS[negations])]
    parts += [random.choice(ADVERBS) if negations == 0 else "", random.choice(ADJECTIVES[word]), "."]
    return " ".join(part for part in parts if part)


def comparison(random: Random, agrees: bool) -> str:
    """A sentence that repeats or reverses the previous judgement."""
    return f"the {random.choice(THINGS)} {COMPARISONS[agrees]}"


def generate(random: Random, level: int) -> tuple[str, str]:
    """A review of difficulty ``level`` (1 to 4) and its label word."""
    label = random.choice((-1, 1))
    count = {1: 1, 2: random.choice((2, 3)), 3: random.choice((1, 3, 3)), 4: random.choice((3, 5))}[level]
    minority = 0
    if level >= 3 and count > 1:
        minority = random.randint(0, (count - 1) // 2)
    judgements = [label] * (count - minority) + [-label] * minority
    random.shuffle(judgements)
    negations = [0] * count
    if level == 3:
        negations = [random.choice((0, 1)) for _ in judgements]
        negations[random.randrange(count)] = 1
    if level == 4:
        negations = [random.choice((0, 0, 1, 1, 2)) for _ in judgements]
    sentences = [sentence(random, j, n) for j, n in zip(judgements, negations, strict=True)]
    for place in range(1, count):
        if level == 4 and random.random() < COMPARED:
            sentences[place] = comparison(random, judgements[place] == judgements[place - 1])
    return " ".join(sentences), LABELS[label == 1]

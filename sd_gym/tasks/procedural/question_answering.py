"""Generated facts about people, and questions that need one to four of the facts.

``dan leads cara . cara helps anna . ... who leads the one who helps anna ?`` is answered with ``dan``. A verb and an
object have at most one subject, so the answer is unique. Distractors are about other people, or have another verb. The
facts are in random order.

* level 1: one hop, up to three distractors, all with the same subject,
* level 2: one hop, four to eight distractors,
* level 3: two hops, one to five distractors,
* level 4: three or four hops, at most three distractors.
"""

from random import Random

NAMES = "anna ben cara dan emma finn gina hugo iris jack kate liam mona nick olga paul".split()
VERBS = "leads helps pays calls".split()
HOPS = {1: (1, 1), 2: (1, 1), 3: (2, 2), 4: (3, 4)}
DISTRACTORS = {1: (0, 3), 2: (4, 8), 3: (1, 5), 4: (0, 3)}
TEMPTING = 0.2  # share of instances with a distractor that shares its object with a needed fact
WORDS = {*NAMES, *VERBS, "who", "the", "one", "?", "."}


def generate(random: Random, level: int) -> tuple[str, str, list[str]]:
    """Facts with a question of difficulty ``level`` (1 to 4), the answer, and the people on the way up to it."""
    hops = random.randint(*HOPS[level])
    count = hops + random.randint(*DISTRACTORS[level])
    people: list[str] = random.sample(NAMES, min(len(NAMES), count + 2))
    way = people[: hops + 1]
    verbs = [random.choice(VERBS) for _ in range(hops)]
    facts = {(verbs[i], way[i]): way[i + 1] for i in range(hops)}
    others = [person for person in people if person != way[1]]
    while level == 1 and len(facts) < count:
        facts[random.choice(VERBS), random.choice(others)] = way[1]
    if len(facts) < count and random.random() < TEMPTING:
        # Two facts with the same object: the verb decides which of them is needed.
        obj = random.choice(way[:-1])
        used = [verb for verb, other in facts if other == obj]
        facts[random.choice([verb for verb in VERBS if verb not in used]), obj] = _subject(random, people, obj)
    while len(facts) < count:
        verb, obj = random.choice(VERBS), random.choice(people[hops:])
        if (verb, obj) not in facts:
            facts[verb, obj] = _subject(random, people, obj)
    lines = [f"{subject} {verb} {obj} ." for (verb, obj), subject in facts.items()]
    random.shuffle(lines)
    question = f"{verbs[0]} {way[0]}"
    for verb in verbs[1:]:
        question = f"{verb} the one who {question}"
    return f"{' '.join(lines)} who {question} ?", way[-1], way[1:]


def _subject(random: Random, people: list[str], obj: str) -> str:
    return random.choice([person for person in people if person != obj])

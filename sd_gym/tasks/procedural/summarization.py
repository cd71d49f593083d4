"""Generated reports of matches; the summary has the outcome, the place, and the players hurt or sent off.

* level 1: only the outcome is stated,
* level 2: the outcome is stated, with irrelevant sentences and up to one salient fact,
* level 3: one to three goals have to be counted for the outcome,
* level 4: three or four goals, some of them disallowed, which do not count, and up to two salient facts.
"""

from random import Random

TEAMS = "falcons tigers bears wolves sharks eagles lions hawks bulls foxes ravens cobras".split()
PLACES = "paris rome oslo lima cairo delhi tokyo quito dakar vienna prague dublin".split()
PLAYERS = "adams brown clark davis evans foster green hill irwin jones klein lopez moore novak owens price".split()
NOISE = (
    "rain fell, fans sang all night, the grass was wet, the stands were full, a dog ran over the field, "
    "the lights went out for a while, the coach shouted, tickets were cheap"
).split(", ")
SALIENT = ("was hurt", "was sent off")
WORDS = {word for phrase in (*NOISE, *SALIENT) for word in phrase.split()}
WORDS |= {*TEAMS, *PLACES, *PLAYERS, "the", "met", "in", ".", "won", "lost", "scored", "for", "but", "it", "did", "not"}
WORDS |= {"count", "beat", "and", "drew", ",", "ended", "level", "match"}


def generate(random: Random, level: int) -> tuple[str, str]:
    """A report of difficulty ``level`` (1 to 4) and its summary."""
    first, second = random.sample(TEAMS, 2)
    place = random.choice(PLACES)
    players = random.sample(PLAYERS, len(PLAYERS))
    events: list[str] = []
    if level <= 2:
        balance = random.choice((1, -1, 0))
        events += [_stated(random, first, second, balance)]
    else:
        goals = [random.choice((1, -1)) for _ in range(random.randint(*((1, 3) if level == 3 else (3, 4))))]
        valid = [level == 3 or random.random() < 0.7 for _ in goals]
        balance = sum(g for g, v in zip(goals, valid, strict=True) if v)
        for goal, counts in zip(goals, valid, strict=True):
            end = "." if counts else "but it did not count ."
            events.append(f"{players.pop()} scored for the {first if goal == 1 else second} {end}")
    salient = [
        f"{players.pop()} {random.choice(SALIENT)}" for _ in range(random.randint(0, {1: 0, 2: 1, 3: 1, 4: 2}[level]))
    ]
    noise = random.sample(
        NOISE, {1: 0, 2: random.randint(1, 3), 3: random.randint(0, 2), 4: random.randint(0, 2)}[level]
    )
    # The summary has the salient facts in the order of the text.
    slots = ["salient"] * len(salient) + [f"{n} ." for n in noise] + events
    random.shuffle(slots)
    remaining = iter(salient)
    body = [f"{next(remaining)} ." if slot == "salient" else slot for slot in slots]
    report = " ".join([f"the {first} met the {second} in {place} .", *body])
    return report, " , ".join([f"{_outcome(first, second, balance)} in {place}", *salient])


def _stated(random: Random, first: str, second: str, balance: int) -> str:
    if balance == 0:
        return "the match ended level ."
    winner, loser = (first, second) if balance > 0 else (second, first)
    return random.choice((f"the {winner} won .", f"the {loser} lost ."))


def _outcome(first: str, second: str, balance: int) -> str:
    if balance == 0:
        return f"{first} and {second} drew"
    return f"{first} beat {second}" if balance > 0 else f"{second} beat {first}"

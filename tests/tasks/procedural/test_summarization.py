"""Generated summaries are right by an independent solution of each instance."""

import re
from collections import Counter

from sd_gym.tasks.procedural import generate_split


def test_summaries_follow_from_the_reports():
    for instance in generate_split("summarization", "train", 500):
        body = instance.source.removeprefix("summarize : ")
        first, second, place = re.match(r"the (\w+) met the (\w+) in (\w+)", body).groups()
        goals = Counter(
            team for team, lost in re.findall(r"scored for the (\w+) (but it did not count )?", body + " ") if not lost
        )
        balance = goals[first] - goals[second]
        if stated := re.search(r"the (\w+) (won|lost) \.", body):
            balance = 1 if (stated[1] == first) == (stated[2] == "won") else -1
        outcome = {0: f"{first} and {second} drew", 1: f"{first} beat {second}", -1: f"{second} beat {first}"}
        salient = re.findall(r"(\w+ was (?:hurt|sent off)) \.", body)
        sign = (balance > 0) - (balance < 0)
        assert instance.target == " , ".join([f"{outcome[sign]} in {place}", *salient])

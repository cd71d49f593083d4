"""Generated questions are right by an independent solution of each instance."""

import re
from collections import Counter
from itertools import islice

from sd_gym.tasks.procedural import generate_split, stream


def test_answers_follow_from_the_facts():
    hops = Counter()
    for instance in generate_split("question_answering", "train", 500):
        body = instance.source.removeprefix("answer : ")
        *facts, question = body.split(" . ")
        who = {}
        for fact in facts:
            subject, verb, obj = fact.split()
            assert (verb, obj) not in who
            who[verb, obj] = subject
        assert instance.difficulty > 1 or len(set(who.values())) == 1  # whoever it is, it is the same one
        steps = re.findall(r"who (\w+)", question)
        person = question.split()[-2]
        for verb in reversed(steps):
            person = who[verb, person]
        assert instance.target == person
        hops[len(steps)] += 1
    assert set(hops) == {1, 2, 3, 4}


def test_traces_name_everyone_on_the_way():
    traces = [i for i in islice(stream("question_answering", "train", 0, trace=0.5), 200) if "trace" in i.source]
    assert 60 < len(traces) < 140
    assert {len(i.target.split()) for i in traces} == {1, 2, 3, 4}

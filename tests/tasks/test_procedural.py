"""The generated tasks: seeded, disjoint, and right by an independent solution of each instance."""

import re
from collections import Counter
from itertools import islice

import pytest

from sd_gym.tasks.procedural import LEVELS, SPLITS, TASKS, generate_split, stream, vocabulary
from sd_gym.tasks.procedural.classification import ADJECTIVES


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_seeded_disjoint_and_hold_all_levels(task):
    splits = {name: generate_split(task, name, 800) for name in SPLITS}
    assert splits["train"] == generate_split(task, "train", 800)
    assert splits["train"] != generate_split(task, "train", 800, seed=1)
    texts = {name: {i.source for i in split} for name, split in splits.items()}
    assert all(len(texts[name]) == 800 for name in SPLITS)
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]
    assert set(Counter(i.difficulty for i in splits["test"])) == set(LEVELS)
    assert len({i.id for i in splits["test"]}) == 800


@pytest.mark.parametrize("task", TASKS)
def test_instances_range_widely_in_length_and_stay_in_the_vocabulary(task):
    instances = generate_split(task, "train", 800)
    lengths = [len(i.source.split()) for i in instances]
    assert max(lengths) > 3 * min(lengths)
    words = set(vocabulary())
    for instance in instances:
        assert set(instance.source.split()) <= words
        assert set(instance.target.split()) <= words


def test_the_longest_instances_are_the_hard_ones_on_average():
    for task in TASKS:
        instances = generate_split(task, "train", 800)
        mean = {}
        for level in LEVELS:
            lengths = [len(i.source.split()) for i in instances if i.difficulty == level]
            mean[level] = sum(lengths) / len(lengths)
        assert mean[1] < mean[4]


def test_reviews_are_labelled_by_the_majority_of_their_sentences():
    compared = 0
    for instance in generate_split("classification", "train", 500):
        score = judgement = 0
        for sentence in instance.source.removeprefix("classify : ").split(" . "):
            words = sentence.removesuffix(" .").split()
            negations = len({"not", "never", "hardly"} & set(words)) + ("anything" in words)
            if "match" in words:  # compared with the sentence before
                compared += 1
                polarity = judgement
            else:
                polarity = next(p for p, adjectives in ADJECTIVES.items() for word in words if word in adjectives)
            judgement = polarity * (-1) ** negations
            score += judgement
        assert instance.target == ("positive" if score > 0 else "negative")
    assert compared > 50


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


def test_traces_name_everyone_on_the_way():
    traces = [i for i in islice(stream("question_answering", "train", 0, trace=0.5), 200) if "trace" in i.source]
    assert 60 < len(traces) < 140
    assert {len(i.target.split()) for i in traces} == {1, 2, 3, 4}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown procedural task 'poetry'"):
        generate_split("poetry", "train", 3)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        generate_split("classification", "dev", 3)
    with pytest.raises(ValueError, match="at least 1"):
        generate_split("classification", "train", 0)

"""Generated reviews are right by an independent solution of each instance."""

from sd_gym.tasks.procedural import generate_split
from sd_gym.tasks.procedural.classification import ADJECTIVES


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

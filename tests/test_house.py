"""What a change may touch: the questions that only one place may ask (``python tests/test_house.py`` counts them)."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Lines that ask what kind of answers a model gives: by a name, a class, a tensor's dtype or its number of dimensions.
KIND = re.compile(
    r"""\boutput(_of\(\w+\))?\ ?(==|!=|in\ OUTPUTS|not\ in)|stored_output|(==|!=)\ "(text|span|label|score)"
    |_?labels\.(is_floating_point|ndim|dim\(|dtype)|logits\.(ndim|dim\()|tokens\.ndim
    |\.generates\b|can_generate\(|(backbone|architecture)\.causal|\bif\ (\w+\.)?causal|self\._generates|self\._answers
    |is_encoder_decoder|num_labels\ ?(<|>|==)|"For(QuestionAnswering|CausalLM|SequenceClassification)
    |"context_mask"\ (not\ )?in|isinstance\((self\.)?(backbone\.)?head,""",
    re.VERBOSE,
)


def asked(root=ROOT):
    """File and line of each such question outside the heads' own files."""
    files = [file for folder in ("sd_gym", "agents") for file in sorted((root / folder).rglob("*.py"))]
    return [
        f"{file.relative_to(root)}:{number}: {line.strip()}"
        for file in files
        if not {"heads", "switch"} & {*file.parts}  # the switches ask what an architecture is built of
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if KIND.search(line) and not line.lstrip().startswith(("#", ">>>", "def ", "from ", "import "))
    ]


def test_only_heads_ask_what_kind_of_answers_there_are():
    assert asked() == []


if __name__ == "__main__":
    import sys

    found = asked(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    print("\n".join([*found, f"{len(found)} places"]))

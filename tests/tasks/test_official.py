"""The official Java programs: what is said where they are absent, and what they give where they are here."""

from __future__ import annotations

import math
import stat
import sys

import pytest

from duallora.errors import DataError
from duallora.tasks import Example, e2e, nlg, official

ROWS = [
    Example(references=("The Eagle is a cheap pub .", "There is a pub , The Eagle ; it isn't dear .")),
    Example(references=("Blue Spice costs £20-25 .", "At £20-25 there 's Blue Spice .", "Blue Spice ( a café )")),
    Example(references=("It is near the river .",)),
]
TEXTS = ["There is a cheap bar called The Eagle .", "Blue Spice costs £20-25 !", ""]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of the programs' layout with empty files."""
    for part in (official.TOKENIZER, official.METEOR, official.PARAPHRASES):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part).touch()
    monkeypatch.setenv(official.VARIABLE, str(tmp_path))
    return tmp_path


def java(folder, monkeypatch, code: str) -> None:
    """A java on the path that is ``code`` in Python."""
    program = folder / "bin" / "java"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{code}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent))


def test_what_is_missing_is_named_and_meteor_is_left_out_with_a_note(home, monkeypatch):
    monkeypatch.setenv("PATH", "")
    values, note = e2e.official_metrics(TEXTS, ROWS)
    assert values == {}
    assert note.startswith("METEOR is left out: no Java runtime")
    (home / official.PARAPHRASES).unlink()
    assert official.missing() == f"{home / official.PARAPHRASES} is missing"
    monkeypatch.delenv(official.VARIABLE)
    monkeypatch.setattr(official.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps pycocoevalcap" in official.missing()


def test_a_program_that_fails_or_ends_early_is_an_error_and_no_value(home, monkeypatch):
    java(home, monkeypatch, "import sys; sys.stderr.write('no memory'); sys.exit(1)")
    with pytest.raises(DataError, match="failed: no memory"):
        official.tokens(["a"])
    with pytest.raises(DataError, match="ended without an answer"):
        official.meteor([["a"]], [[["a"]]])
    (home / "bin" / "java").write_text(f"#!{sys.executable}\nimport os; os.close(0)")  # gone while it is written to
    with pytest.raises(DataError, match="ended without an answer"):
        official.meteor([["a"] * 200_000], [[["a"]]])


def test_tokens_keep_to_their_texts_whatever_breaks_a_line(home, monkeypatch):
    """A java that prints its file: a text with a line separator inside, or empty, must not shift those after it."""
    java(home, monkeypatch, "import sys; print(open(sys.argv[-1], encoding='utf-8', newline='\\n').read(), end='')")
    assert official.tokens(["a\u2028b\r\nc .", "", "d -LRB- e"]) == [["a", "b", "c"], [], ["d", "e"]]


def test_meteors_protocol_is_the_scorers(home, monkeypatch):
    """Every row's counts are asked for with its references first, then all are evaluated; the last answer counts."""
    java(
        home, monkeypatch,
        "import sys\n"
        "rows = 0\n"
        "for line in sys.stdin:\n"
        "    kind, *fields = line.rstrip('\\n').split(' ||| ')\n"
        "    if kind == 'SCORE':\n"
        "        rows += 1\n"
        "        print('+'.join(fields), flush=True)\n"
        "    else:\n"
        "        assert fields == ['r 1+r 2+guess', 's+other'], fields\n"
        "        print(*[0.1] * rows, 0.25, sep='\\n', flush=True)\n",
    )  # fmt: skip
    assert official.meteor([["guess"], ["other"]], [[["r", "1"], ["r", "2"]], [["s"]]]) == 25.0


@pytest.mark.skipif(bool(official.missing()), reason=f"needs the official programs: {official.missing()}")
def test_the_metrics_equal_those_of_the_coco_scorers_on_the_same_programs(monkeypatch):
    """pycocoevalcap's own Python classes drive the same jars: tokens, METEOR, ROUGE-L and CIDEr."""
    monkeypatch.syspath_prepend(str(official.folder().parent))
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    values, note = e2e.official_metrics(TEXTS, ROWS)
    tokenizer = PTBTokenizer()
    gold = tokenizer.tokenize({i: [{"caption": text} for text in row.references] for i, row in enumerate(ROWS)})
    guess = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(TEXTS)})
    expected = {
        "meteor": 100 * Meteor().compute_score(gold, guess)[0],
        "rouge_l": 100 * Rouge().compute_score(gold, guess)[0],
        "cider": Cider().compute_score(gold, guess)[0],
    }
    assert values == pytest.approx(expected, rel=1e-9)
    assert "official" in note


def factor_of(ratio: float) -> float:
    return math.exp(-math.log(2) * (math.log(ratio) / math.log(1.5)) ** 2)


def test_nist_of_the_perl_script_takes_the_length_over_the_most_references_any_row_has():
    # Row 1 has two references (4 and 2 words), row 2 one (2 words): 8 words over 2 = 4 against 2 + 2 produced: no penalty.
    # Over each row's own mean it would be 3 + 2 = 5.
    rows = [["a b c d", "a b"], ["e f"]]
    texts = ["a b", "e f"]
    unigrams = (2 * math.log2(8 / 2) + 2 * math.log2(8 / 1)) / 4  # each bigram is as frequent as its head: 0
    assert nlg.nist(texts, rows, perl=True) == pytest.approx(unigrams)
    # -p also counts -1, -2 and -3 n-grams of the orders 3 to 5 for each text: without hits, they weigh nothing
    assert nlg.nist(texts, rows) == pytest.approx(factor_of(4 / 5) * unigrams)


def test_nist_of_the_perl_script_takes_a_head_of_zero_for_none():
    # "0 x": the head "0" is false in Perl, so the bigram is weighed against all 4 words and not against the two "0".
    rows = [["0 x 0 y"]]
    assert nlg.nist(["0 x"], rows, order=2, perl=True) - nlg.nist(["0 x"], rows, order=1, perl=True) == (
        pytest.approx(math.log2(4 / 1) * factor_of(2 / 4))
    )

"""The paper's tasks: prompt bytes, answer extraction, metrics, file layouts, and the real data's sizes."""

from __future__ import annotations

import hashlib
import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from duallora.errors import ConfigError, DataError
from duallora.tasks import TASKS, Example, commonsense, e2e, encode, load_data, load_task

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
    "\n### Instruction:\n%s\n\n### Response:\n"
)


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    monkeypatch.delenv("DUALLORA_DATA", raising=False)


def commonsense_folder(root, name, split, rows):
    folder = root / "commonsense" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
    return root


def item(gold: str, instruction: str = "Pick {one}.") -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {gold}", "answer": gold}


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("boolq", "the correct answer is true, not false", "true"),
        ("boolq", "True", ""),
        ("piqa", "solution2 or solution1", "solution2"),
        ("arc_easy", "answer5", "answer5"),
        ("arc_easy", "answer6", ""),
        ("hellaswag", " ending4.", "ending4"),
        ("winogrande", "the correct answer is option", ""),
        ("winogrande", "option12", "option1"),
    ],
)
def test_first_match_is_case_sensitive_and_empty_where_nothing_matches(tmp_path, name, text, answer):
    task, row = load_task(name, data_dir=tmp_path), Example(references=("x",), group=name)
    assert task.extract(text, row) == answer
    assert task.metrics([answer, "x"], [row, row]) == {"accuracy": 50.0, "parse_failure_rate": 0.0 if answer else 50.0}


def a_mixture(root):
    """boolq with 9 training rows, winogrande with 4 and no test, piqa with a test of 2 and no training rows."""
    commonsense_folder(root, "boolq", "train", [item("true", f"b{index}") for index in range(9)])
    commonsense_folder(root, "boolq", "test", [item("false", "B")])
    commonsense_folder(root, "winogrande", "train_l", [item("option2", f"w{index}") for index in range(4)])
    return commonsense_folder(root, "piqa", "test", [item("solution1", "P1"), item("solution2", "P2")])


def test_the_mixture_is_the_union_of_the_tasks_own_splits_taken_in_turn(tmp_path):
    task = load_task("commonsense", data_dir=a_mixture(tmp_path))
    for split, names in (("train", ["boolq", "winogrande"]), ("validation", ["boolq", "winogrande"])):
        own = {name: list(load_task(name, data_dir=tmp_path).splits[split]) for name in names}
        rows = task.splits[split]
        assert {name: [row for row in rows if row.group == name] for name in names} == own
        assert len(rows) == sum(map(len, own.values()))
    assert [row.group for row in task.splits["train"]] == ["boolq", "winogrande"] * 3 + ["boolq"] * 4
    assert [row.group for row in task.splits["test"]] == ["boolq", "piqa", "piqa"]
    assert "the training rows of arc_easy, arc_challenge, piqa, social_i_qa, hellaswag, openbookqa" in task.source
    assert "the test rows of arc_easy, arc_challenge, social_i_qa, hellaswag, winogrande, openbookqa" in task.source


def test_a_mixture_of_nothing_is_an_error_and_one_without_a_damaged_file_too(tmp_path):
    with pytest.raises(DataError, match=r"no train rows of any of the eight.*commonsense/boolq/train\.json"):
        load_task("commonsense", data_dir=tmp_path).splits["train"]
    root = a_mixture(tmp_path)
    (root / "commonsense" / "winogrande" / "train_l.json").write_text("[{")
    with pytest.raises(DataError, match="winogrande"):
        load_task("commonsense", data_dir=root).splits["train"]


def test_the_mixture_scores_each_task_by_its_own_words_and_averages_the_tasks_and_not_the_rows(tmp_path):
    task = load_task("commonsense", data_dir=a_mixture(tmp_path))
    rows = task.splits["test"]
    texts = ["solution2 is false", "true solution1", "solution1"]  # each holds another task's word, too
    expected = {
        "average": 75.0, "parse_failure_rate": 0.0,
        "accuracy_boolq": 100.0, "parse_failure_rate_boolq": 0.0,
        "accuracy_piqa": 50.0, "parse_failure_rate_piqa": 0.0,
    }  # fmt: skip
    answers = [task.extract(text, row) for text, row in zip(texts, rows, strict=True)]
    assert answers == ["false", "solution1", "solution1"]
    assert task.metrics(answers, rows) == expected
    assert task.metrics(["", "solution1", ""], rows)["parse_failure_rate"] == pytest.approx(200 / 3)
    assert task.metrics(["", "solution1", ""], rows)["average"] == 25.0


@pytest.mark.parametrize("place", [".", "ft-training_set"])
def test_llm_adapters_own_mixture_is_what_the_mixture_trains_on(tmp_path, place):
    """With the protocol's prompt, beside the tests of each task; its rows and hash are told; a row of another form is named."""
    root = a_mixture(tmp_path)
    golds = ["true", "answer5", "solution2", "ending4", "option1"] * 4
    rows = [item(gold, f"m{index}") for index, gold in enumerate(golds)]
    file = root / place / "commonsense_170k.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(rows))
    task = load_task("commonsense", data_dir=root)
    train, validation = task.splits["train"], task.splits["validation"]
    assert (len(train), len(validation)) == (15, 5)
    prompts = {PROMPT % f"m{index}" for index in range(20)}
    assert {row.prompt for row in [*train, *validation]} == prompts
    assert {row.group for row in train} <= {"boolq", "answer", "piqa", "hellaswag", "winogrande"}
    assert all(task.extract(row.answer, row) == row.references[0] for row in [*train, *validation])
    assert [row.group for row in task.splits["test"]] == ["boolq", "piqa", "piqa"]
    assert f"20 of commonsense_170k.json, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}" in task.source
    by_path = load_data(str(file))
    assert {row.prompt for rows in by_path.splits.values() for row in rows} == prompts
    assert any("LLM-Adapters" in note for note in by_path.notes)
    file.write_text(json.dumps([*rows, item("answer6")]))
    with pytest.raises(DataError, match="unknown answer"):
        load_task("commonsense", data_dir=root)


def test_commonsense_validation_is_cut_from_the_training_rows(tmp_path):
    rows = [item(f"option{1 + index % 2}", f"q{index}") for index in range(700)]
    task = load_task("winogrande", data_dir=commonsense_folder(tmp_path, "winogrande", "train_l", rows))
    train, held = task.splits["train"], task.splits["validation"]
    assert (len(train), len(held)) == (580, 120)
    assert {row.prompt for row in train}.isdisjoint({row.prompt for row in held})
    with pytest.raises(DataError, match=r"the test file of winogrande is missing: no file .*winogrande/test\.json"):
        task.splits["test"]


def test_faulty_commonsense_rows_are_named(tmp_path):
    rows = [item("true"), {"instruction": "x", "output": "y"}, item("maybe")]
    folder = commonsense_folder(tmp_path, "boolq", "test", rows)
    with pytest.raises(
        DataError, match=r"(?s)2 bad rows of 3.*json:2, column answer: missing.*json:3, column answer: unk"
    ):
        load_task("boolq", data_dir=folder).splits["test"]


CHOICES = "Please choose the correct answer to the question: "
HUB = [
    ("boolq", {"question": "is ice cold", "answer": True, "passage": "unused"},
     "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false", "true"),
    ("piqa", {"goal": "Open it.", "sol1": "Pull.", "sol2": "Push.", "label": 1},
     "Please choose the correct solution to the question: Open it.\n\nSolution1: Pull.\n\nSolution2: Push.\n\n"
     "Answer format: solution1/solution2", "solution2"),
    ("social_i_qa", {"context": "A left.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
     CHOICES + "A left. Why?\n\nAnswer1: x Answer2: y Answer3: z\n\nAnswer format: answer1/answer2/answer3", "answer3"),
    ("hellaswag", {"activity_label": "Rowing", "ctx": "A man sits. he", "endings": list("wxyz"), "label": "0"},
     "Please choose the correct ending to complete the given sentence: Rowing: A man sits. he\n\n"
     "Ending1: w Ending2: x Ending3: y Ending4: z\n\nAnswer format: ending1/ending2/ending3/ending4", "ending1"),
    ("winogrande", {"sentence": "A saw B so _ ran.", "option1": "A", "option2": "B", "answer": "2"},
     "Please choose the correct answer to fill in the blank to complete the given sentence: A saw B so _ ran.\n\n"
     "Option1: A Option2: B Answer format: option1/option2", "option2"),
    ("arc_challenge", {"question": "Q?", "choices": {"text": list("uvwxy"), "label": list("12345")}, "answerKey": "5"},
     CHOICES + "Q?\n\nAnswer1: u Answer2: v Answer3: w Answer4: x Answer5: y\n\n"
     "Answer format: answer1/answer2/answer3/answer4/answer5", "answer5"),
    ("openbookqa", {"question_stem": "Q is", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "B"},
     CHOICES + "Q is\n\nAnswer1: w Answer2: x Answer3: y Answer4: z\n\nAnswer format: answer1/answer2/answer3/answer4", "answer2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "instruction", "gold"), HUB, ids=[name for name, *_ in HUB])
def test_hub_rows_are_put_into_the_words_of_the_files(monkeypatch, name, row, instruction, gold):
    protocol = commonsense.PROTOCOLS[name]

    def load_hub(*where):
        assert where == protocol.hub
        return {"train": [row], protocol.hub_test: [row]}

    monkeypatch.setattr(commonsense, "load_hub", load_hub)
    task = load_task(name)
    (example,) = task.splits["test"]
    assert example.prompt == PROMPT % instruction
    assert (example.answer, example.references) == (f"the correct answer is {gold}", (gold,))
    assert (task.generation["max_new_tokens"], task.generation["num_beams"]) == (16, 4)


def glue_file(root, name, file, lines):
    folder = root / "glue" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def test_glue_layouts_with_and_without_header_and_with_loose_quotes(tmp_path):
    def read(name, folder, *lines):
        task = load_task(name, data_dir=glue_file(tmp_path, folder, "dev.tsv", lines))
        return task, [(row.texts, row.label) for row in task.splits["validation"]]

    cola = read("cola", "CoLA", 'gj04\t1\t\tHe said "no.', "gj04\t0\t*\tHim said.")[1]
    assert cola == [(('He said "no.',), 1), (("Him said.",), 0)]
    qqp = read("qqp", "QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "7\t8\t9\tx?\ty?\t1")[1]
    assert qqp == [(("x?", "y?"), 1)]
    mrpc = read("mrpc", "MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t5\t6\tx\ty")[1]
    assert mrpc == [(("x", "y"), 1)]
    stsb, rows = read("stsb", "STS-B", "index\tsentence1\tsentence2\tscore", "0\ta\tb\t2.500")
    assert (stsb.kind, rows) == ("regress", [(("a", "b"), 2.5)])
    qnli, rows = read("qnli", "QNLI", "index\tquestion\tsentence\tlabel", "0\tq?\ts.\tnot_entailment")
    assert [(texts, qnli.labels[label]) for texts, label in rows] == [(("q?", "s."), "not_entailment")]
    assert qnli.splits["test"] == qnli.splits["validation"]
    assert "test is the development set" in qnli.source
    with pytest.raises(DataError, match=r"train\.tsv of qnli is missing"):
        qnli.splits["train"]


def test_broken_glue_files_are_data_errors(tmp_path):
    glue_file(tmp_path, "RTE", "dev.tsv", ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tmaybe", "1\ta\tb"])
    with pytest.raises(DataError, match=r"(?s)2 of 2 rows.*dev\.tsv:2.*unknown label 'maybe'.*dev\.tsv:3.*got 3"):
        load_task("rte", data_dir=tmp_path).splits["validation"]
    glue_file(tmp_path, "RTE", "dev.tsv", ["a\tb", "0\t1"])
    with pytest.raises(DataError, match="no column 'sentence1'; the file has a, b"):
        load_task("rte", data_dir=tmp_path).splits["validation"]


def test_a_stray_broken_line_of_a_large_glue_file_is_left_out_with_a_warning(tmp_path, caplog):
    root = glue_file(tmp_path, "SST-2", "dev.tsv", ["sentence\tlabel", *["good\t1"] * 1500, "broken"])
    assert len(load_task("sst2", data_dir=root).splits["validation"]) == 1500
    assert "1 bad row of 1501" in caplog.text


def test_glue_metrics(tmp_path):
    rows = [Example(texts=("t",), label=label) for label in (1, 1, 0, 0)]
    found = {
        name: load_task(name, data_dir=tmp_path).metrics([1, 0, 0, 0], rows) for name in ("cola", "mrpc", "qqp", "rte")
    }
    assert set(found["cola"]) == {"matthews", "accuracy"}
    assert found["mrpc"] == found["qqp"] == {"accuracy": 75.0, "f1": pytest.approx(100 * 2 / 3)}
    assert found["rte"] == {"accuracy": 75.0}


def test_mnli_test_scores_both_development_sets_together_and_apart(tmp_path):
    root = tmp_path / "mismatched"  # the name of a folder says nothing of the rows
    header = "index\tsentence1\tsentence2\tgold_label"
    glue_file(root, "MNLI", "dev_matched.tsv", [header, "0\ta\tb\tneutral", "1\ta\tb\tcontradiction"])
    glue_file(root, "MNLI", "dev_mismatched.tsv", [header, "0\tc\td\tentailment", "1\tc\td\tneutral"])
    task = load_task("mnli", data_dir=root)
    assert len(task.splits["validation"]) == 2
    values = task.metrics([1, 2, 0, 0], task.splits["test"])
    assert values == {"accuracy": 75.0, "accuracy_matched": 100.0, "accuracy_mismatched": 50.0}


def test_glue_from_the_hub(monkeypatch):
    from duallora.tasks import glue

    tables = {
        "validation_matched": [{"premise": "p", "hypothesis": "h", "label": 2}],
        "validation_mismatched": [{"premise": "q", "hypothesis": "i", "label": 0}],
    }
    monkeypatch.setattr(glue, "load_hub", lambda name, config: tables)
    rows = load_task("mnli").splits["test"]
    assert [(row.texts, row.label) for row in rows] == [(("p", "h"), 2), (("q", "i"), 0)]
    assert load_task("mnli").metrics([2, 1], rows)["accuracy_mismatched"] == 0.0


def e2e_folder(root):
    folder = root / "e2e_nlg"
    folder.mkdir(exist_ok=True)
    lines = ["name : A | food : B||A serves B . ", "name : C||C is there . ", "name : A | food : B||B at A . "]
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_e2e_groups_references_by_meaning_outside_training(tmp_path):
    task = load_task("e2e", data_dir=e2e_folder(tmp_path))
    assert [row.answer for row in task.splits["train"]] == ["A serves B .", "C is there .", "B at A ."]
    first, second = task.splits["test"]
    assert first.prompt == "name : A | food : B\n"
    assert first.references == ("A serves B .", "B at A .")
    assert second.references == ("C is there .",)
    assert task.generation["num_beams"] == 10
    assert task.extract(" A serves B .\nname : C", first) == "A serves B ."


def test_e2e_in_loras_own_tokens(tmp_path):
    """gpt2_encode.py: BPE(meaning) + [50256], BPE(" " + sentence) + [50256]; here with a byte-level BPE that has the same mark."""
    mark, letters = "<|endoftext|>", "abcdefghijklmnopqrstuvwxyzABC:|.\u0120"
    text = Tokenizer(BPE({mark: 0, **{letter: at for at, letter in enumerate(letters, 1)}}, []))
    text.pre_tokenizer = ByteLevel(add_prefix_space=False)
    text.add_special_tokens([mark])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, eos_token=mark, bos_token=mark, pad_token=mark)
    row = load_task("e2e_gpt2", data_dir=e2e_folder(tmp_path)).splits["train"][0]
    (encoded,) = encode(row, tokenizer, max_length=64)
    meaning, sentence = (tokenizer(part)["input_ids"] for part in ("name : A | food : B", " A serves B ."))
    assert encoded.input_ids == [*meaning, 0, *sentence, 0]
    assert encoded.labels == [-100] * (len(meaning) + 1) + [*sentence, 0]
    assert row.references == ("A serves B .",)


def test_e2e_lines_without_separator_are_named(tmp_path):
    root = e2e_folder(tmp_path)
    (root / "e2e_nlg" / "valid.txt").write_text("name : A||x\nname : B\nname : C||\n")
    with pytest.raises(DataError, match=r"(?s)valid\.txt:2: no \|\|.*valid\.txt:3: the sentence or the meaning is"):
        load_task("e2e", data_dir=root).splits["validation"]


def test_e2e_hub_meanings_read_as_in_the_files():
    given = "name[Blue, Spice], eatType[pub], customer rating[5 out of 5], familyFriendly[no], priceRange[£20-25]"
    assert e2e.meaning_of(given) == (
        "name : Blue, Spice | Type : pub | customer rating : 5 out of 5 | family friendly : no | price : £20-25"
    )


def test_unknown_tasks_and_folders_and_the_folder_of_the_environment(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="unknown task 'arc-easy'; nearest: arc_easy"):
        load_task("arc-easy")
    with pytest.raises(DataError, match="which is no folder"):
        load_task("rte", data_dir=tmp_path / "absent")
    assert len(TASKS) == len(set(TASKS)) == 21
    monkeypatch.setenv("DUALLORA_DATA", str(e2e_folder(tmp_path)))
    assert len(load_task("e2e").splits["validation"]) == 2


SIZES = {
    "boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "hellaswag": 10042, "winogrande": 1267, "arc_easy": 2376,
    "arc_challenge": 1172, "openbookqa": 500, "e2e": 630, "cola": 1043, "sst2": 872, "rte": 277, "stsb": 1500,
    "qnli": 5463,
}  # fmt: skip


@pytest.mark.data
@pytest.mark.parametrize("name", SIZES)
def test_real_test_sets_have_the_published_sizes_and_gold_answers_score_full(shared_data, name):
    task = load_task(name, data_dir=shared_data)
    rows = task.splits["test"]
    assert len(rows) == SIZES[name]
    if name == "e2e":
        assert len(task.splits["validation"]) == 547
        rows = rows[:20]
    gold = [row.answer or row.label for row in rows] if task.kind == "generate" else [row.label for row in rows]
    if task.extract:
        gold = [task.extract(text, row) for text, row in zip(gold, rows, strict=True)]
    assert task.metrics(gold, rows)[task.main_metric] == pytest.approx(100)


@pytest.mark.data
def test_real_e2e_leave_one_out_equals_the_official_scorer(shared_data):
    """The last reference of each meaning scored against the others.

    Official values: coco-caption's Python scorers behind Stanford's Java tokenizer, run once on the same split.
    """
    from duallora.tasks import nlg

    rows = [row for row in load_task("e2e", data_dir=shared_data).splits["test"] if len(row.references) > 1]
    texts, references = [row.references[-1] for row in rows], [row.references[:-1] for row in rows]
    assert nlg.rouge_l(texts, references) == pytest.approx(62.32103543559844, abs=1e-9)
    assert nlg.cider(texts, references) == pytest.approx(1.8600834149302536, abs=0.0015)  # "£" is "#" in Java

"""`duallora predict`: the model's own answers to unlabeled rows, a chunk at a time, gone on with where it stopped."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path

import pytest
import torch

from duallora import cli, console
from duallora.errors import ConfigError, DataError
from duallora.folders import cache_folder
from duallora.tasks.files import Questions
from duallora.train import evaluate
from duallora.train import predict as prediction

FEW = ["r=2", "train.batch_size=4", "data.max_length=48", "report_to=[]", "max_steps=2", "eval.batch_size=1"]
QUICK = [word for setting in FEW for word in ("--set", setting)]
NAMES = ["no", "so, so", "yes"]  # one that a careless CSV would split


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    console.use_json(False)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tiny_encoder_folder) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    rows = [{"review": f"Count {i}", "stars": NAMES[i % 3]} for i in range(12)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = [
        "train",
        "--model",
        str(tiny_encoder_folder),
        "--data",
        str(folder / "mine.jsonl"),
        "-o",
        str(folder / "run"),
    ]
    assert cli.run([*line, "--columns", "text=review,label=stars", *QUICK]) == 0
    return folder / "run"


def write_rows(count: int = 19) -> None:
    with Path("new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "review"], *([i, f'Row "{i}",\nsecond {"x" * i}'] for i in range(count))])


def test_a_classifier_gives_each_row_its_class_with_the_probability_of_every_one(classifier, tiny_encoder_folder):
    """Against transformers and PEFT alone, a row at a time: rows are sorted by length and padded on the way."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    write_rows()
    assert cli.run(["predict", str(classifier), "new.csv", "-o", "out.csv", "--set", "eval.batch_size=5"]) == 0
    assert cli.run(["predict", str(classifier), "new.csv", "-o", "out.jsonl"]) == 0
    base = AutoModelForSequenceClassification.from_pretrained(tiny_encoder_folder, num_labels=3)
    model = PeftModel.from_pretrained(base, classifier / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_folder)
    with Path("out.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert list(found[0]) == ["id", "review", "prediction", "probability", *(f"p({name})" for name in NAMES)]
    for number, (row, line) in enumerate(zip(found, lines, strict=True)):
        assert row["id"] == line["id"] == str(number)
        assert row["review"] == line["review"] == f'Row "{number}",\nsecond {"x" * number}'
        with torch.no_grad():
            tokens = tokenizer(row["review"], truncation=True, max_length=48, return_tensors="pt")
            right = model(**tokens).logits[0].softmax(-1).tolist()
        assert [float(row[f"p({name})"]) for name in NAMES] == pytest.approx(right, abs=2e-5)
        assert list(line["probabilities"].values()) == pytest.approx(right, abs=2e-5)
        assert row["prediction"] == line["prediction"] == NAMES[right.index(max(right))]
        assert float(row["probability"]) == pytest.approx(max(right), abs=2e-5)


@pytest.mark.parametrize(("output", "signal"), [("out.csv", KeyboardInterrupt), ("out.jsonl", SystemExit(143))])
def test_what_was_interrupted_goes_on_behind_its_last_whole_chunk(output, signal, classifier, monkeypatch, capsys):
    write_rows()
    assert cli.run(["predict", str(classifier), "new.csv", "-o", f"whole{output}"]) == 0
    asked = []
    own = evaluate.classify

    def stops(model, tokenizer, rows, **how):
        asked.append(len(rows))
        if len(asked) == 2:
            raise signal
        return own(model, tokenizer, rows, **how)

    monkeypatch.setattr(evaluate, "classify", stops)
    assert cli.run(["predict", str(classifier), "new.csv", "-o", output]) in (130, 143)
    part = Path(f"{output}.part")
    assert not Path(output).exists()
    assert part.exists()
    with part.open("a") as file:  # what a kill in the middle of the next chunk leaves
        file.write('8,"half a ro')
    refused = ["predict", str(classifier), "new.csv", "-o", output, "--set", "data.max_length=20", "--json"]
    capsys.readouterr()
    assert cli.run(refused) == 2
    assert "other settings" in json.loads(capsys.readouterr().out)["error"]
    assert cli.run(["predict", str(classifier), "new.csv", "-o", output, "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert (payload["rows"], payload["resumed"]) == (19, 8)
    assert asked == [8, 8, 8, 3]
    assert Path(output).read_bytes() == Path(f"whole{output}").read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == sorted([output, f"whole{output}", "new.csv"])


def test_before_the_first_chunk_nothing_is_left_behind(classifier, monkeypatch):
    write_rows()
    monkeypatch.setattr(evaluate, "classify", lambda *args, **how: torch.full((len(args[2]), 3), torch.nan))
    assert cli.run(["predict", str(classifier), "new.csv", "-o", "out.csv"]) == 5
    assert [path.name for path in Path().iterdir()] == ["new.csv"]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("none.csv -o out.csv", 3, "no file none.csv"),
        ("new.csv -o out.txt", 2, "expected a name that ends in .csv or .jsonl"),
        ("prompts.csv -o out.csv", 3, "has no column 'review'"),
        ("prompts.csv -o out.csv --columns label=prompt", 3, "needs the question alone"),
        ("prompts.csv -o out.csv --columns txt=prompt", 2, "nearest: text"),
        ("bad.jsonl -o out.csv", 3, "bad.jsonl:2, column review: empty text"),
        ("twice.csv -o out.csv", 2, "has a column 'prediction' already"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_leaves_nothing(line, code, words, classifier, capsys):
    write_rows(2)
    Path("prompts.csv").write_text("prompt\nWhat?\n")
    Path("bad.jsonl").write_text('{"review": "a"}\n{"review": " "}\n')
    Path("twice.csv").write_text("review,prediction\na,b\n")
    before = sorted(Path().iterdir())
    assert cli.run(["predict", str(classifier), *line.split(), "--json"]) == code
    assert words in json.loads(capsys.readouterr().out)["error"]
    assert sorted(Path().iterdir()) == before


def test_a_generator_answers_as_it_is_scored_and_each_run_is_told_what_it_is_good_for(
    tiny_causal_folder, classifier, capsys
):
    """The prompts alone; the answers are those that `duallora eval` compares."""
    rows = "".join(f"Count {i},word{i % 3}\n" for i in range(10))
    Path("mine.csv").write_text("prompt,completion\n" + rows)
    line = ["train", "--model", str(tiny_causal_folder), "--data", "mine.csv", "-o", "run", *QUICK, "--set"]
    assert cli.run([*line, "max_new_tokens=5"]) == 0
    said = capsys.readouterr().out
    assert "duallora eval run, or duallora predict run FILE -o answers.csv, or duallora merge run" in said
    assert "gate 1" in said or "gate 0" in said
    scores = next(one for one in said.splitlines() if one.startswith("scores"))
    assert scores.split()[1] == "exact_match"  # of one word BLEU says nothing
    Path("all.csv").write_text("prompt,completion\n" + rows)
    assert cli.run(["eval", "run", "--data", "all.csv", "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)["predictions"]
    Path("new.csv").write_text("prompt\n" + "".join(f"Count {i}\n" for i in range(10)))
    assert cli.run(["predict", "run", "new.csv", "-o", "out.jsonl"]) == 0
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert found == [{"prompt": f"Count {i}", "prediction": wanted[i]} for i in range(10)]
    line = ["train", "--model", str(tiny_causal_folder), "--data", "mine.csv", "-o", "virtual", "--method", "prompt"]
    assert cli.run([*line, *QUICK[2:], "--set", "eval.metrics=false"]) == 0
    said = capsys.readouterr().out
    assert "next: duallora eval virtual" in said
    assert "merge" not in said  # of virtual tokens there is nothing to merge
    assert "gate" not in said


def test_a_column_of_the_users_stays_as_it_is_whatever_it_is_called(classifier, monkeypatch):
    """The answers of a .jsonl file have an object "probabilities", those of a .csv file a column for each class."""
    Path("new.csv").write_text("review,probabilities\nCount 1,x\n")
    monkeypatch.setenv("DUALLORA_CACHE", str(cache_folder()))
    monkeypatch.setenv("HOME", str(Path.cwd()))  # quoted, the shell leaves ~ to us
    assert cli.run(["predict", str(classifier), "~/new.csv", "-o", "out.csv"]) == 0
    with Path("out.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["review"], row["probabilities"]) == ("Count 1", "x")
    assert float(row["p(yes)"]) > 0
    for columns in (["probabilities", "prediction"], None):  # of a model without classes
        line = prediction._line({"probabilities": "x"}, {"prediction": 0.5}, columns)
        assert line == ("x,0.5\n" if columns else '{"probabilities": "x", "prediction": 0.5}\n')


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "more"}]


@pytest.mark.parametrize(
    ("rows", "kind", "form", "prompt", "roles"),
    [
        ([{"prompt": "p"}], "generate", "prompt-completion", "p", []),
        ([{"prompt": CHAT}], "generate", "prompt-completion", "", ["user", "assistant", "user"]),
        ([{"messages": CHAT}], "generate", "messages", "", ["user", "assistant", "user"]),
        ([{"messages": CHAT[:2]}], "generate", "messages", "", ["user"]),
        ([{"conversations": [{"from": "human", "value": "q"}]}], "generate", "messages", "", ["user"]),
        ([{"text": "go on"}], "generate", "text", "go on", []),
        ([{"instruction": "do"}], "generate", "alpaca", None, []),
        ([{"premise": "a", "hypothesis": "b"}], "classify", "classification", "", []),
    ],
)
def test_every_form_can_be_asked_without_its_answers(rows, kind, form, prompt, roles, tmp_path):
    file = tmp_path / "new.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    questions = Questions(str(file), kind)
    ((row, example),) = questions
    assert (questions.format, questions.count, row) == (form, 1, rows[0])
    assert [turn["role"] for turn in example.messages] == roles
    assert (example.answer, example.references, example.label) == ("", (), None)
    assert prompt is None or example.prompt == prompt
    if form == "alpaca":
        assert example.prompt.endswith("### Instruction:\ndo\n\n### Response:\n")


@pytest.mark.parametrize("said", ["", " \n", None, 5, ["x"]])
def test_an_answer_that_stands_in_the_row_is_not_looked_at(said, tmp_path):
    """A column or a turn that is to be filled in is often there already, and empty."""
    gpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": said}]
    rows = [
        {"prompt": "p", "completion": said},
        {"instruction": "do", "output": said},
        {"messages": [CHAT[0], {"role": "assistant", "content": said}]},
        {"conversations": gpt},
        {"messages": json.dumps([CHAT[0], {"role": "assistant", "content": said}])},
    ]
    for row in rows:
        (tmp_path / "new.jsonl").write_text(json.dumps(row))
        ((_, example),) = Questions(str(tmp_path / "new.jsonl"), "generate")
        assert example.references == ()
        assert len(example.messages) == ("messages" in row or "conversations" in row)


def test_a_file_is_read_a_row_at_a_time(tmp_path):
    """3 MB of rows in a few hundred kB of memory."""
    for name, head, row in (("a.csv", "text\n", "{}\n"), ("a.jsonl", "", '{{"text": "{}"}}\n')):
        (tmp_path / name).write_text(head + "".join(row.format(f"{i} " + "x" * 1000) for i in range(3000)))
        questions = Questions(str(tmp_path / name), "classify")
        tracemalloc.start()
        assert sum(1 for _ in questions) == 3000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 500_000, name


def test_a_chat_of_the_assistant_alone_asks_nothing(tmp_path):
    (tmp_path / "new.jsonl").write_text(json.dumps({"messages": CHAT[1:2]}))
    with pytest.raises(DataError, match="nothing is asked"):
        Questions(str(tmp_path / "new.jsonl"), "generate")
    with pytest.raises(ConfigError, match=r"unknown name in data\.columns 'txet'; nearest: text"):
        Questions(str(tmp_path / "new.jsonl"), "generate", columns={"txet": "a"})

"""A user's own files: every format is read, every fault is named by file, line and column."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duallora.errors import ConfigError, DataError
from duallora.tasks import encode, load_data
from duallora.tasks.metrics import OF_KIND

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def good_lines(count: int) -> list[str]:
    return [f'{{"prompt": "p{index}", "completion": "c{index}"}}' for index in range(count)]


def write(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows_of(task):
    return [*task.splits["train"], *task.splits["validation"]]


@pytest.mark.parametrize(
    ("name", "row", "other"),
    [
        ("prompt-completion", {"prompt": "p", "completion": "c", "extra": 1}, {}),
        ("messages", {"messages": CHAT}, {}),
        ("messages", {"conversations": CHAT}, {}),
        ("alpaca", {"instruction": "i", "input": "", "output": "o"}, {}),
        ("classification", {"text": "t", "label": "b"}, {"label": "a"}),
        ("classification", {"sentence": "t", "label": "b"}, {"label": "a"}),
        ("classification", {"text1": "t", "text2": "t", "label": "b"}, {"label": "a"}),
        ("classification", {"sentence1": "t", "sentence2": "t", "label": "b"}, {"label": "a"}),
        ("classification", {"premise": "t", "hypothesis": "t", "label": "b"}, {"label": "a"}),
    ],
)
def test_a_format_is_detected_by_its_columns(tmp_path, name, row, other):
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, [row, row | other])))
    task = load_data(path, eval_data=path)
    kind = "classify" if other else "generate"
    assert (task.format, task.kind, {*task.metrics.names}) == (name, kind, {*OF_KIND[kind].names})
    assert len(task.splits["train"]) == 2
    if other:
        assert task.labels == ("a", "b")
        texts = tuple(value for key, value in row.items() if key != "label")
        assert [(one.texts, one.label) for one in task.splits["train"]] == [(texts, 1), (texts, 0)]


def test_alpaca_wording_with_and_without_input(tmp_path):
    rows = [{"instruction": "Add {x}.", "output": "3"}, {"instruction": "Add.", "input": "1 2", "output": "3"}]
    task = load_data(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert {example.prompt for example in rows_of(task)} == {
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {x}.\n\n### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n",
    }


def test_the_same_rows_give_the_same_task_in_every_file_kind(tmp_path):
    rows = [{"prompt": f'a "{index}",\tü', "completion": f"line\n{index}"} for index in range(5)]
    write(tmp_path / "r.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    write(tmp_path / "r.json", json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        cells = [["prompt", "completion"], *([row["prompt"].replace('"', '""'), row["completion"]] for row in rows)]
        lines = [separator.join(f'"{cell}"' for cell in row) for row in cells]
        write(tmp_path / f"r.{suffix}", "\r\n".join(lines) + "\r\n")
    tasks = {path.suffix: load_data(str(path)) for path in tmp_path.iterdir()}
    assert len(tasks) == 5
    assert len({task.fingerprint("train") for task in tasks.values()}) == 1
    assert {re.sub(r".*:", "", example.where) for example in rows_of(tasks[".csv"])} == {"2", "4", "6", "8", "10"}


LINES = [
    (b'{"prompt": "p", "completion": }', r", column 31: bad JSON"),
    (b'{"prompt": "p", "complet', r"bad JSON .*the last line is cut off"),
    (b'{"prompt": "p\0", "completion": "c"}', r", column 14: holds a NUL character"),
    (b'{"prompt": "p\xff", "completion": "c"}', r", column 14: not UTF-8 \(byte 0xff\)"),
    (b'{"prompt": "p", "completion": 3}', r", column completion: expected text, got a number \(3\)"),
    (b'{"prompt": "p"}', r", column completion: missing field"),
    (b'{"prompt": " ", "completion": ""}', r", column completion: prompt and completion are both empty"),
    (b'{"prompt": "p", "completion": " \\n"}', r", column completion: empty answer"),
    (b'["prompt", "completion"]', r"expected an object \{\.\.\.\}, got a list"),
    (
        b'{"prompt": "p", "completion": "c", "n": ' + b"9" * 5000 + b"}",
        r": a number of more than 4300 digits; write it",
    ),
    (b'{"prompt": "p \\uD83D", "completion": "c"}', r": \\ud83d is half of a character; write both halves"),
    (b"[" * 100_000, r"JSON nested too deeply|bad JSON"),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=[message[:30] for _, message in LINES])
def test_each_fault_names_file_line_and_column(tmp_path, line, message):
    good = [text.encode() for text in good_lines(4)]
    path = write(tmp_path / "bad.jsonl", b"\n".join([*good[:2], b"", *good[2:], line]))
    with pytest.raises(DataError, match=rf"1 bad row of 5 in .*\n.*bad\.jsonl:6.*({message})") as caught:
        load_data(path)
    assert all(len(text) < 300 for text in str(caught.value).splitlines())
    skipped = load_data(path, bad_rows="skip")
    assert len(rows_of(skipped)) == 4
    assert re.search(r"1 bad row of 5 .*skipped", "\n".join(skipped.notes))


def test_at_most_twenty_faults_are_listed_and_all_are_counted(tmp_path):
    path = write(tmp_path / "many.jsonl", "\n".join([*good_lines(2), *["{"] * 33]))
    with pytest.raises(
        DataError, match=r"^33 bad rows of 35 in [^ ]+many\.jsonl:\n(.*bad JSON.*\n){20}\.\.\. and 13 more"
    ):
        load_data(path)
    with pytest.raises(DataError, match="no good one is left"):
        load_data(write(tmp_path / "none.jsonl", "{\n{\n"), bad_rows="skip")


def test_a_blank_answer_of_a_table_is_a_bad_row(tmp_path):
    """CSV has no null: "a," is a row whose output is missing, and training on it would teach silence."""
    path = write(tmp_path / "blank.csv", "instruction,output\ni,a\ni,\ni,b\ni,  \n")
    with pytest.raises(
        DataError, match=r"2 bad rows of 4(.|\n)*:3, column output: empty answer(.|\n)*:5, column output: em"
    ):
        load_data(path)
    assert sorted(example.answer for example in rows_of(load_data(path, bad_rows="skip"))) == ["a", "b"]


def test_a_class_that_is_hardly_trained_on_is_named(tmp_path):
    rows = [f"text {n},{'a' if n % 2 else 'b'}" for n in range(40)]
    task = load_data(write(tmp_path / "t.csv", "\n".join(["text,label", *rows, "once,c"])))
    trained = sum(task.labels[row.label] == "c" for row in task.splits["train"])
    assert f"classes of hardly any training row: c ({trained})" in task.notes


TWO = json.dumps([{"prompt": "a", "completion": "b"}])
REFUSED = [
    ("x.csv", "prompt,completion\na,b\nc\nd,e\n", r"x\.csv:3: expected 2 fields as in the header, got 1"),
    ("x.csv", 'prompt,completion\na,b\nc,"d\ne,f\n', r"x\.csv:3: bad CSV"),
    ("x.csv", 'prompt,completion\na,b\n"c\nc2",d\ne,f,g\n', r"x\.csv:5: expected 2 fields .* got 3"),
    ("x.csv", "prompt,prompt\na,b\n", "a column name occurs twice"),
    ("x.csv", "question;answer\na;b, c\n", "has the columns question, answer, which fit none"),
    ("x.csv", "text,label\na,x\nb,x\n", "holds 1 class"),
    ("x.csv", "text,label\n" + "t,1.5\n" * 20 + "bad,oops", r"x\.csv:22, column label: expected a finite number, got text \('oops'\)"),
    ("x.csv", "prompt,completion\n\u00e9,b\nc,d\n".encode("latin-1"), r"x\.csv:2, column 1: not UTF-8 \(byte 0xe9\)"),
    ("x.csv", b"\xff\xfe" + b"\x00\xd8" * 3, r"x\.csv begins as UTF-16 text does, but is none"),
    ("x.json", '[\n{"prompt": "a",\n "completion": "b"},\n{"prompt": }]', r"x\.json:4, column 12: bad JSON"),
    ("x.json", '{"prompt": "a"}\n{"prompt": "b"}', r"expected a list .*name the file \.jsonl"),
    ("x.json", TWO[:-1], r"x\.json:1, column 36: bad JSON \(Expecting ',' delim"),
    ("x.json", TWO[:-1] + ",\n\n3]", r"x\.json:3: expected an object"),
    ("x.json", TWO[:-1] + ',\n{"n": ' + "9" * 5000 + "}]", r"x\.json:2: a number of more than 4300 digits"),
    ("x.json", TWO[:-1] + ',\n{"prompt": "\\udc00"}]', r"x\.json:2: \\udc00 is half of a character"),
    ("x.json", f"{TWO}\n{TWO}", "text stands behind the list, which would be lost"),
    ("x.jsonl", f"{TWO}\n{TWO}", "2 bad rows of 2"),
    ("x.jsonl", "\n".join(['["prompt"]', *good_lines(2)]), r"1 bad row of 3(.|\n)*x\.jsonl:1: expected an object .*a list"),
    ("x.jsonl", '[\n{"prompt": }]', r"x\.jsonl:2, column 12: bad JSON"),
    ("x.jsonl", "\n".join(good_lines(3)).encode("utf-16-le"), "looks like UTF-16 without a byte order mark.*save it as UTF-8"),
    ("x.jsonl", '{"question": "a", "answer": "b"}', r"(?s)columns question, answer, which fit none.*prompt-completion  prompt, "),
    ("x.jsonl", good_lines(1)[0], "has 1 row; expected at least 2"),
    *((f"x.{suffix}", "", "is empty; expected at least one row") for suffix in ("jsonl", "csv", "json")),
    ("x.parquet", b"PAR1 nothing", "not a readable parquet file"),
    ("x.xlsx", "a", r"ending '\.xlsx'; expected one of"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), REFUSED, ids=[f"{n} {m[:30]}" for n, _, m in REFUSED])
def test_a_file_that_is_not_understood_is_refused_with_the_place(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        load_data(write(tmp_path / name, content))


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no file .*nowhere\.jsonl"):
        load_data(str(tmp_path / "nowhere.jsonl"))
    path = write(tmp_path / "rows.jsonl", "\n".join(good_lines(2)))
    with pytest.raises(DataError, match=r"is a folder; expected one of its files: rows\.jsonl"):
        load_data(str(tmp_path))

    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read: Permission denied"):
        load_data(path)


TABLE = [("a; b, c", "x"), ("d\u00e9j\u00e0", "y"), ('say "no"', "x")]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom", "utf-32"]


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_a_table_is_read_however_it_is_written(tmp_path, at, end):
    """Semicolons of a German Excel, lone carriage returns of an old Mac, UTF-16 of a Windows shell."""
    suffix, separator, name = [
        ("csv", ",", ""), ("csv", ";", "semicolons"), ("csv", "\t", "tabs"), ("csv", "|", "bars"), ("tsv", "\t", ""), ("tsv", ",", "commas"),
    ][at]  # fmt: skip
    encoding = ENCODINGS[(at + len(end) + ord(end[0])) % 6]
    cells = [["text", "label"], *TABLE]
    text = "".join(separator.join('"' + cell.replace('"', '""') + '"' for cell in row) + end for row in cells)
    text = "\ufeff" * encoding.endswith("-bom") + text
    task = load_data(write(tmp_path / f"t.{suffix}", text.encode(encoding.removesuffix("-bom"))))
    assert sorted((row.texts[0], task.labels[row.label]) for row in rows_of(task)) == sorted(TABLE)
    assert task.notes == ("classification, 2 classes x, y", *[f"t.{suffix} is separated by {name}"] * bool(name))
    assert sorted(row.where.rpartition(":")[2] for row in rows_of(task)) == ["2", "3", "4"]


def test_a_separator_inside_the_text_is_none_and_a_carriage_return_among_line_feeds_ends_no_line(tmp_path):
    for content, texts in (
        ("text,label\na;b;c,x\nd|e,y\n", {("a;b;c",), ("d|e",)}),
        ('text,label\n"a\rb",x\n"c",y\n', {("a\rb",), ("c",)}),
    ):
        assert {row.texts for row in rows_of(load_data(write(tmp_path / "t.csv", content)))} == texts
    large = "\r".join([json.dumps({"prompt": "p" * 300_000, "completion": "c"})] * 3)
    assert len(rows_of(load_data(write(tmp_path / "l.jsonl", large)))) == 3


@pytest.mark.parametrize(("head", "indent"), [("", None), ("\n \n", 1)])
def test_a_json_list_named_jsonl_is_read_as_one(tmp_path, head, indent):
    rows = [json.loads(line) for line in good_lines(4)]
    task = load_data(write(tmp_path / "a.jsonl", head + json.dumps(rows, indent=indent)))
    assert task.notes == ("a.jsonl is one JSON list and no JSON lines, and was read as that",)
    assert {example.prompt for example in rows_of(task)} == {"p0", "p1", "p2", "p3"}


def test_columns_that_nothing_is_made_of_are_named(tmp_path):
    path = write(tmp_path / "t.csv", "id,text,label,when\n1,a,x,0\n2,b,y,0\n")
    assert load_data(path).notes[1:] == ("columns not used: id, when",)
    assert load_data(path, ignore_keys=["id", "when"]).notes[1:] == ()


def test_unknown_names_and_fractions_are_config_errors(tmp_path):
    path = write(tmp_path / "g.jsonl", "\n".join(good_lines(4)))
    for data, options, message in (
        (path, {"format": "alpacca"}, "nearest: alpaca"),
        (path, {"eval_fraction": 1.5}, r"eval_fraction is 1\.5"),
        ("builtin:docstring", {}, "nearest: builtin:docstrings"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_data(data, **options)


def test_a_hub_name_without_the_hub_is_a_clear_data_error(monkeypatch):
    monkeypatch.setattr("duallora.tasks.hub.reachable", lambda: False)
    with pytest.raises(DataError, match=r"data set org/nothing-there.*hub.*give a local file.*DUALLORA_DATA"):
        load_data("org/nothing-there")
    with pytest.raises(DataError, match="no file 'justaname'"):
        load_data("justaname")


def test_a_hub_data_set_keeps_its_own_splits_and_class_names(monkeypatch):
    """A real ``datasets`` object stands in for the download; everything behind it runs."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})

    def table(labels):
        return datasets.Dataset.from_dict(
            {"text": [f"t{index}" for index in range(len(labels))], "label": labels}, features=features
        )

    tables = datasets.DatasetDict(train=table([1, 0, 1, 0]), test=table([-1, -1]))
    monkeypatch.setattr("duallora.tasks.rows.load_hub", lambda name, config: tables)
    task = load_data("org/name:config", eval_fraction=0.25)
    assert task.labels == ("no", "yes")
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 3, "validation": 1}
    tables["validation"] = table([1, 1])
    tables["test"] = table([0])
    task = load_data("org/name:config")
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 4, "validation": 2, "test": 1}
    assert task.splits["validation"][0].where == "org/name:config:validation:1"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(2, 60), fraction=st.floats(0.001, 0.999))
def test_split_is_a_partition_that_depends_on_the_data_alone(tmp_path, count, fraction):
    path = write(tmp_path / "s.jsonl", "\n".join(good_lines(count)))
    task, again = (load_data(path, eval_fraction=fraction) for _ in range(2))
    train, held = ([example.where for example in task.splits[split]] for split in ("train", "validation"))
    assert min(len(train), len(held)) > 0
    assert sorted([*train, *held]) == sorted(f"{path}:{line}" for line in range(1, count + 1))
    assert again.fingerprint("validation") == task.fingerprint("validation")
    assert abs(len(held) - fraction * count) <= 1


def test_eval_file_is_the_validation_split(tmp_path):
    train = write(tmp_path / "t.jsonl", "\n".join(good_lines(3)))
    held = write(tmp_path / "v.csv", "prompt,completion\nvp,vc\n")
    task = load_data(train, eval_data=held)
    assert [example.prompt for example in task.splits["train"]] == ["p0", "p1", "p2"]
    assert [(example.prompt, example.where) for example in task.splits["validation"]] == [("vp", f"{held}:2")]


def test_columns_of_any_name_are_read_as_they_are_told(tmp_path):
    """What is told goes before what the file calls so itself; messages name the file's own column."""
    content = "prompt;question;completion;category;id\nold;Who?;no;a person;1\nold;Where?;no;a place;2\n"
    file = write(tmp_path / "x.csv", content)
    task = load_data(file, columns={"prompt": "question", "completion": "category"})
    assert task.format == "prompt-completion"
    assert sorted((row.prompt, row.answer) for row in rows_of(task)) == [("Where?", "a place"), ("Who?", "a person")]
    assert {"columns as told: prompt is question, completion is category", "columns not used: id"} < {*task.notes}
    assert load_data(file, columns={"text": "question", "label": "category"}).labels == ("a person", "a place")
    with pytest.raises(DataError, match=r"has no column 'categry' .*it has prompt, question, completion, category, id"):
        load_data(file, columns={"prompt": "question", "completion": "categry"})
    with pytest.raises(ConfigError, match=r"unknown name in data\.columns 'answer'; nearest: label"):
        load_data(file, columns={"answer": "category"})
    write(tmp_path / "x.csv", "question;category\nWho?;a person\nWhere?;\n")
    with pytest.raises(DataError, match=r"x.csv:3, column category: empty answer"):
        load_data(file, columns={"prompt": "question", "completion": "category"})


def test_plain_text_is_trained_on_whole_and_scored_by_its_loss_alone(tmp_path, tiny_tokenizer):
    """A text beside other columns may lack its label: it is not taken for plain text unless that is said."""
    write(tmp_path / "a.txt", "First line.\n\n  Second one.  \n")
    write(tmp_path / "a.jsonl", '{"text": "First line."}\n{"text": "  Second one.  "}\n')
    for name in ("a.txt", "a.jsonl"):
        task = load_data(str(tmp_path / name))
        assert (task.format, task.kind, task.main_metric, task.loss_only) == ("text", "generate", "loss", True)
        assert sorted((row.prompt, row.answer) for row in rows_of(task)) == [
            ("", "  Second one.  "),
            ("", "First line."),
        ]
    row = encode(task.splits["train"][0], tiny_tokenizer, max_length=64)[0]
    assert row.labels == [-100, *row.input_ids[1:]]
    assert row.input_ids[-1] == tiny_tokenizer.eos_token_id
    path = write(tmp_path / "b.csv", "text,category\nt,c\nu,d\n")
    with pytest.raises(DataError, match="--columns"):
        load_data(path)
    assert "columns not used: category" in load_data(path, format="text").notes


@pytest.mark.parametrize(("answer", "first"), [("billing", "exact_match"), ("it was the bill that came", "bleu")])
def test_answers_of_a_word_or_three_are_ranked_by_exact_match(answer, first, tmp_path):
    rows = [json.dumps({"prompt": f"{i}", "completion": answer}) for i in range(4)]
    task = load_data(write(tmp_path / "x.jsonl", "\n".join(rows)))
    assert task.main_metric == task.metrics.names[0] == first

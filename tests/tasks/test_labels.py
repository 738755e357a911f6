"""One table is one task: the same kind, classes and order whatever file and type its labels come in."""

from __future__ import annotations

import decimal
import json
import re

import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from duallora.errors import ConfigError, DataError
from duallora.tasks import load_data
from duallora.tasks.example import BadRow
from duallora.tasks.labels import class_name, number, read_labels, trained_labels

FORMATS = ("csv", "tsv", "jsonl", "json", "parquet")


def write(path, labels, dtype=None, **texts) -> str:
    """A table of ``labels`` in the file's own form, written by pandas as people write it."""
    texts = texts or {"text": [f"t{at:02}" for at in range(len(labels))]}
    table = pandas.DataFrame({**texts, "label": pandas.Series(labels, dtype=dtype)})
    if path.suffix in (".csv", ".tsv"):
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    return str(path)


def written(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def rows_of(task):
    return sorted((*task.splits["train"], *task.splits["validation"]), key=lambda row: row.texts)


WHOLE = [0, 10, 2, 11, 1, 3, 4, 5, 6, 7, 8, 9] * 2
ORDER = tuple(map(str, range(12)))
FRACTIONS = [1, 2.5, 3, 10, 4, 0.125]
TABLES = [  # labels, what pandas is to make of them, the classes; () of targets
    *((WHOLE, dtype, ORDER) for dtype in ("int64", "float64", "str")),
    *((FRACTIONS, dtype, ()) for dtype in ("float64", "str")),
    ([True, False, True, True], None, ("False", "True")),
    (["true", "False", "TRUE", "true"], None, ("False", "True")),
    (["b", "a", "ab", "b"], None, ("a", "ab", "b")),
    (["10", "9", "other", "2"], None, ("2", "9", "10", "other")),
    (["007", "12", "1"], None, ("1", "007", "12")),  # a code keeps its noughts
    (["1.0", "2.0", "other"], None, ("1", "2", "other")),
    ([-1, 1], None, ("-1", "1")),
    (["v1", "v10", "v2"], None, ("v1", "v10", "v2")),
    (["1_000", "2"], None, ("2", "1_000")),  # Python reads 1_000 as a number; nobody else does
    (["٣", "٤"], None, ("٣", "٤")),
]  # fmt: skip


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("labels", "dtype", "classes"), TABLES, ids=range(len(TABLES)))
def test_a_table_has_the_same_classes_in_one_order_or_targets_in_every_format(tmp_path, suffix, labels, dtype, classes):
    task = load_data(write(tmp_path / f"t.{suffix}", labels, dtype))
    found = [row.label for row in rows_of(task)]
    assert (task.kind, task.labels) == ("classify" if classes else "regress", classes)
    if classes:
        names = [str(label).removesuffix(".0") for label in labels]
        assert [classes[label].lower() for label in found] == [name.lower() for name in names]
    else:
        assert found == [float(label) for label in labels]
        assert all(type(label) is float for label in found)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "Int64", "float32", "Float64", "category"])
def test_whole_numbers_of_every_type_of_arrow_are_classes(tmp_path, dtype):
    assert load_data(write(tmp_path / "t.parquet", WHOLE, dtype)).labels == ORDER


def test_what_was_decided_is_said_with_how_to_tell_otherwise():
    whole = "classification, 12 classes 0..11 (whole-number labels; --set data.labels=numbers to regress)"
    targets = "regression, numbers from 0.125 to 10 (some have a fraction; --set data.labels=classes to classify)"
    assert [read_labels(labels).note for labels in (WHOLE, FRACTIONS)] == [whole, targets]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_cell_that_was_once_empty_is_a_bad_row_and_changes_nothing_else(tmp_path, suffix):
    """pandas makes floats of integers as soon as one cell is empty: 0.0 ... 11.0 and NaN."""
    labels = [*map(float, WHOLE), float("nan")]
    path = write(tmp_path / f"t.{suffix}", labels)
    with pytest.raises(DataError, match=r"1 bad row of 25(.|\n)*column label: empty label"):
        load_data(path)
    task = load_data(path, bad_rows="skip")
    assert (task.kind, task.labels, len(rows_of(task))) == ("classify", ORDER, 24)


def test_nan_itself_in_json_and_parquet_is_an_empty_cell(tmp_path):
    lines = [json.dumps({"text": f"t{at}", "label": label}) for at, label in enumerate([1.0, 2.0, float("nan")])]
    written(tmp_path / "t.jsonl", "\n".join(lines))
    table = pyarrow.table({"text": ["a", "b", "c"], "label": pyarrow.array([1.0, 2.0, float("nan")])})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match="1 bad row of 3"):
            load_data(str(path))
        assert load_data(str(path), bad_rows="skip").labels == ("1", "2")


@pytest.mark.parametrize("word", ["nan", "NaN", "NA", "N/A", "None", "null", "<NA>", "inf"])
def test_a_word_for_nothing_among_numbers_is_no_class(tmp_path, word):
    with pytest.raises(DataError, match=r"t\.csv:4, column label: text .* is no label among numbers"):
        load_data(written(tmp_path / "t.csv", f"text,label\na,1\nb,2\nc,{word}\n"))
    names = load_data(written(tmp_path / "n.csv", f"text,label\na,x\nb,y\nc,{word}\n"))
    assert word in names.labels


@pytest.mark.parametrize(
    ("values", "labels", "targets"),
    [
        ([decimal.Decimal("3.00"), decimal.Decimal("10.00")], ("3", "10"), [0, 1]),
        (numpy.array([3, 10], dtype=numpy.float16), ("3", "10"), [0, 1]),
        ([decimal.Decimal("3.50"), decimal.Decimal("10.00")], (), [3.5, 10.0]),
    ],
    ids=["whole decimals", "half floats", "decimals"],
)
def test_decimals_and_half_floats_of_parquet_are_numbers(tmp_path, values, labels, targets):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": values}), tmp_path / "t.parquet")
    task = load_data(str(tmp_path / "t.parquet"))
    assert (task.labels, [row.label for row in rows_of(task)]) == (labels, targets)


def test_the_recipe_can_tell_otherwise(tmp_path):
    task = load_data(write(tmp_path / "w.csv", [3.0, 10.0, 3.0]), labels="numbers")
    assert (task.kind, [row.label for row in rows_of(task)]) == ("regress", [3.0, 10.0, 3.0])
    task = load_data(write(tmp_path / "f.csv", [1.5, 10.25, 2.5, 1.5]), labels="classes")
    assert (task.kind, task.labels) == ("classify", ("1.5", "2.5", "10.25"))
    with pytest.raises(DataError, match=r"bad row(.|\n)*expected a finite number, got text \('red'\)"):
        load_data(write(tmp_path / "n.csv", ["red", "1", "2"]), labels="numbers")


@pytest.mark.parametrize("digits", [310, 500])
def test_a_label_beyond_every_number_is_a_bad_row(tmp_path, digits):
    for name, label in (("t.jsonl", "9" * digits), ("s.jsonl", f'"{"9" * digits}"')):
        (tmp_path / name).write_text(f'{{"text": "a", "label": {label}}}\n{{"text": "b", "label": 0.5}}\n')
        with pytest.raises(DataError, match=r"1 bad row of 2(.|\n)*:1, column label: expected a finite number, got"):
            load_data(str(tmp_path / name), labels="numbers")


def test_versions_and_decimal_commas_told_to_be_classes_keep_their_text(tmp_path):
    versions = written(tmp_path / "v.csv", "text,label\na,1.10\nb,1.1\nc,1.9\n")
    assert load_data(versions, labels="classes").labels == ("1.1", "1.10", "1.9")
    commas = written(tmp_path / "c.csv", "text;label\na;3,5\nb;4\nc;1,25\n")
    with pytest.raises(DataError, match="decimal comma, such as 1,25"):
        load_data(commas)
    assert load_data(commas, labels="classes").labels == ("4", "1,25", "3,5")


def test_many_whole_numbers_must_be_said_to_be_classes_or_amounts(tmp_path):
    """Years and prices are no classes, 150 intents are; a table that could be both is asked about."""
    path = write(tmp_path / "y.csv", [1950 + at for at in range(40)] * 5)
    with pytest.raises(
        DataError, match=r"40 different whole numbers from 1950 to 1989 in 200 rows.*data\.labels=numbers"
    ):
        load_data(path)
    assert load_data(path, labels="numbers").kind == "regress"
    assert len(load_data(path, labels="classes").labels) == 40
    intents = [*range(150)] * 3
    some_missing = [at for at in intents if at % 3]
    few = [1950 + at for at in range(20)]  # all of them can be seen on the screen
    for values, count in ((intents, 150), (some_missing, 100), ([*range(1, 78)] * 5, 77), (few, 20)):
        assert len(read_labels(values).classes) == count
    for amounts in ([*range(150)], [at * 10 for at in range(30)] * 4, [*range(18, 90)] * 4):
        with pytest.raises(DataError, match="classes or amounts"):
            read_labels(amounts)


def test_a_label_that_is_missing_a_list_or_an_object_is_a_bad_row(tmp_path):
    labels = [{"label": 1}, {"label": 2}, {"label": [1]}, {"label": {}}, {}]
    lines = [json.dumps({"text": "t", **label}) for label in labels]
    with pytest.raises(DataError) as caught:
        load_data(written(tmp_path / "t.jsonl", "\n".join(lines)))
    found = re.findall(r":(\d), column label: (.*?, got a list|.*?, got an object|missing field)", str(caught.value))
    expected = "expected a class name or number, got"
    assert found == [("3", f"{expected} a list"), ("4", f"{expected} an object"), ("5", "missing field")]


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_empty_text_beside_another_is_one_in_every_format(tmp_path, suffix):
    texts = {"text1": ["a", "b", None], "text2": ["c", None, None]}
    path = write(tmp_path / f"t.{suffix}", ["x", "y", "x"], **texts)
    with pytest.raises(DataError, match=r"1 bad row of 3(.|\n)*column text1: empty text"):
        load_data(path)
    assert [row.texts for row in rows_of(load_data(path, bad_rows="skip"))] == [("a", "c"), ("b", "")]


def test_a_parquet_file_of_the_hub_keeps_its_class_names(tmp_path):
    """``datasets`` keeps a ClassLabel's names beside the table: the file and the hub are one task, even of odd names."""
    import datasets

    declared = datasets.ClassLabel(names=["1.5", "10.5", "9.5"])
    features = datasets.Features({"text": datasets.Value("string"), "label": declared})

    def table(labels):
        rows = {"text": [*"abcd"[: len(labels)]], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
        return str(tmp_path / "t.parquet")

    task = load_data(table([0, 1, 2, 1]))
    assert (task.kind, task.labels) == ("classify", ("1.5", "9.5", "10.5"))
    assert [task.labels[row.label] for row in rows_of(task)] == ["1.5", "10.5", "9.5", "10.5"]
    with pytest.raises(DataError, match=r"1 bad row of 3(.|\n)*empty label"):
        load_data(table([0, 1, -1]))


def test_names_and_numbers_of_single_labels():
    cases = [
        (3, "3", 3), (3.0, "3", 3.0), ("3", "3", 3), (" 3.00 ", "3", 3.0), ("+3", "3", 3), ("-0", "0", 0), ("-3.", "-3", -3.0),
        ("3.5", "3.5", 3.5), (3.5, "3.5", 3.5), (".5", ".5", 0.5), ("1e3", "1e3", 1000.0), ("03", "03", None),
        ("1,5", "1,5", None), ("0x1", "0x1", None), ("three", "three", None), ("", "", None), (True, "True", None),
        (10**30, str(10**30), 10**30), (str(10**30), str(10**30), 10**30), (1e30, "1e+30", 1e30),
        (10**400, str(10**400), float("inf")), (str(10**350), str(10**350), float("inf")),
    ]  # fmt: skip
    for label, name, value in cases:
        assert (class_name(label), number(label)) == (name, value), label
    assert (class_name([1]), class_name(float("inf")), number([1])) == (None, None, None)


def test_labels_are_told_of_rows_with_a_label_alone(tmp_path):
    path = written(tmp_path / "p.jsonl", '{"prompt": "a", "completion": "b"}\n' * 2)
    with pytest.raises(ConfigError, match=r"data\.labels=numbers is for rows with a label, but .* holds prompt-compl"):
        load_data(path, labels="numbers")
    with pytest.raises(ConfigError, match=r"unknown data\.labels 'number'; nearest: numbers"):
        load_data(path, labels="number")


@pytest.mark.parametrize(
    ("classes", "values", "ids"),
    [
        (("bad", "good"), ["good"], [1]),
        (("0", "1", "2"), ["2", 2, 2.0, "2.0", decimal.Decimal(0)], [2, 2, 2, 2, 0]),
        (("0.0", "1.0", "10.0"), [10, "10.0", 1.0], [2, 2, 1]),  # trained before whole numbers had one name
        (("False", "True"), [True, "true", "False"], [1, 1, 0]),
        (("0.5", "1.5"), [1.5], [1]),
        ((), ["1", 2, 3.5], [1.0, 2.0, 3.5]),  # of numbers, whole as they may be
    ],
)
def test_a_trained_model_says_what_labels_are(classes, values, ids):
    found = trained_labels([*values, None, ""], classes)
    assert found.classes == classes
    assert [found.read(value) for value in values] == ids
    with pytest.raises(BadRow, match="empty label"):
        found.read(None)


def test_classes_a_trained_model_does_not_know_are_named_with_those_it_does():
    with pytest.raises(
        ConfigError, match=r"classes 3, 10, maybe, which the model was not trained on; it knows 0, 1, 2"
    ):
        trained_labels(["maybe", 10, 1, 3.0, "nan", [1], None], ("0", "1", "2"))


def test_rows_that_no_class_or_number_can_be_read_from_are_faults_of_theirs(tmp_path):
    path = write(tmp_path / "a.csv", ["1", "nan", "2"])
    with pytest.raises(DataError, match=r"1 bad row of 3.*\n.*a\.csv:3.* no label among numbers"):
        load_data(path, eval_data=path, trained=("classify", ("1", "2", "3")))
    path = write(tmp_path / "b.csv", ["1", "low", "2"])
    with pytest.raises(DataError, match=r"b\.csv:3.*expected a finite number, got text \('low'\)"):
        load_data(path, eval_data=path, trained=("regress", ()))


@pytest.mark.parametrize(
    ("trained", "values", "labels"),
    [
        (("regress", ()), [7, 1, 7], ()),
        (("classify", ORDER), [7, 1, 7], ORDER),
        (("classify", ()), [1.5, 0.5], ("0.5", "1.5")),  # its classes have no names
    ],
)
def test_a_file_is_read_as_the_model_was_trained(tmp_path, trained, values, labels):
    path = write(tmp_path / "a.csv", values)
    task = load_data(path, eval_data=path, trained=trained)
    assert (task.kind, task.labels) == (trained[0], labels)
    expected = [labels.index(str(value)) for value in values] if labels else [7.0, 1.0, 7.0]
    assert [row.label for row in task.splits["train"]] == expected

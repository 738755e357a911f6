"""One table is one task: the same kind, classes and order whatever file and type its labels come in."""

from __future__ import annotations

import decimal
import json

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


def write(path, labels, dtype=None) -> str:
    """A table of ``labels`` in the file's own form, written by pandas as people write it."""
    table = pandas.DataFrame(
        {"text": [f"t{at}" for at in range(len(labels))], "label": pandas.Series(labels, dtype=dtype)}
    )
    if path.suffix in (".csv", ".tsv"):
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    return str(path)


def rows_of(task):
    return sorted((*task.splits["train"], *task.splits["validation"]), key=lambda row: row.texts)


WHOLE = [0, 10, 2, 11, 1, 3, 4, 5, 6, 7, 8, 9] * 2
ORDER = tuple(map(str, range(12)))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "dtype", ["int64", "int8", "uint16", "Int64", "float64", "float32", "Float64", "str", "category"]
)
def test_whole_numbers_are_classes_in_numeric_order(tmp_path, suffix, dtype):
    task = load_data(write(tmp_path / f"t.{suffix}", WHOLE, dtype))
    assert (task.kind, task.labels) == ("classify", ORDER)
    assert task.notes == (
        "classification, 12 classes 0..11 (whole-number labels; --set data.labels=numbers to regress)",
    )
    expected = {f"t{at}": label for at, label in enumerate(WHOLE)}
    assert {row.texts[0]: row.label for row in rows_of(task)} == expected


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
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    table = pyarrow.table({"text": ["a", "b", "c"], "label": pyarrow.array([1.0, 2.0, float("nan")])})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match="1 bad row of 3"):
            load_data(str(path))
        assert load_data(str(path), bad_rows="skip").labels == ("1", "2")


@pytest.mark.parametrize("word", ["nan", "NaN", "NA", "N/A", "None", "null", "<NA>", "inf"])
def test_a_word_for_nothing_among_numbers_is_no_class(tmp_path, word):
    (tmp_path / "t.csv").write_text(f"text,label\na,1\nb,2\nc,{word}\n")
    with pytest.raises(DataError, match=r"t\.csv:4, column label: text .* is no label among numbers"):
        load_data(str(tmp_path / "t.csv"))
    (tmp_path / "n.csv").write_text(f"text,label\na,x\nb,y\nc,{word}\n")  # among names it is a name
    assert word in load_data(str(tmp_path / "n.csv")).labels


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", ["float64", "str", "Float64"])
def test_a_fraction_makes_targets_of_all(tmp_path, suffix, dtype):
    labels = [1, 2.5, 3, 10, 4, 0.125]
    task = load_data(write(tmp_path / f"t.{suffix}", labels, dtype))
    assert (task.kind, task.labels) == ("regress", ())
    assert task.notes == (
        "regression, numbers from 0.125 to 10 (some have a fraction; --set data.labels=classes to classify)",
    )
    assert [row.label for row in rows_of(task)] == [float(label) for label in labels]
    assert all(type(row.label) is float for row in rows_of(task))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "labels", [[True, False, True, True], ["True", "False", "True", "True"], ["true", "false", "TRUE", "true"]]
)
def test_truth_values_are_two_classes(tmp_path, suffix, labels):
    task = load_data(write(tmp_path / f"t.{suffix}", labels))
    assert (task.kind, task.labels) == ("classify", ("False", "True"))
    assert [row.label for row in rows_of(task)] == [1, 0, 1, 1]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "ab", "b"], ("a", "ab", "b")),
        (["10", "9", "other", "2"], ("2", "9", "10", "other")),
        (["007", "12", "1"], ("1", "007", "12")),  # a code keeps its noughts
        (["-1", "0", "1"], ("-1", "0", "1")),
        (["1.0", "2.0", "other"], ("1", "2", "other")),
        ([-1, 1], ("-1", "1")),
        (["v1", "v10", "v2"], ("v1", "v10", "v2")),
        (["1_000", "2"], ("2", "1_000")),  # Python reads 1_000 as a number; nobody else does
        (["٣", "٤"], ("٣", "٤")),
    ],
    ids=str,
)  # fmt: skip
def test_names_stay_as_they_are_in_one_order(tmp_path, suffix, labels, classes):
    task = load_data(write(tmp_path / f"t.{suffix}", labels))
    assert (task.kind, task.labels) == ("classify", classes)
    assert [classes[row.label] for row in rows_of(task)] == [str(label).removesuffix(".0") for label in labels]


def test_decimals_and_half_floats_of_parquet_are_numbers(tmp_path):
    for name, values in {
        "whole": [decimal.Decimal("3.00"), decimal.Decimal("10.00")],
        "half": numpy.array([3, 10], dtype=numpy.float16),
    }.items():
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": values}), path)
        assert load_data(str(path)).labels == ("3", "10")
    path = tmp_path / "fraction.parquet"
    values = [decimal.Decimal("3.50"), decimal.Decimal("10.00")]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": values}), path)
    assert [row.label for row in rows_of(load_data(str(path)))] == [3.5, 10.0]


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_recipe_can_tell_otherwise(tmp_path, suffix):
    whole = write(tmp_path / f"w.{suffix}", [float(label) for label in WHOLE])
    task = load_data(whole, labels="numbers")
    assert (task.kind, task.labels) == ("regress", ())
    assert [row.label for row in rows_of(task)] == [
        float(label) for _, label in sorted(zip(map(str, range(24)), WHOLE, strict=True))
    ]
    fractions = write(tmp_path / f"f.{suffix}", [1.5, 10.25, 2.5, 1.5])
    task = load_data(fractions, labels="classes")
    assert (task.kind, task.labels) == ("classify", ("1.5", "2.5", "10.25"))
    with pytest.raises(DataError, match=r"bad row(.|\n)*expected a finite number, got text \('red'\)"):
        load_data(write(tmp_path / f"n.{suffix}", ["red", "1", "2"]), labels="numbers")


@pytest.mark.parametrize("digits", [310, 399, 500])
def test_a_label_beyond_every_number_is_a_bad_row(tmp_path, digits):
    for name, label in (("t.jsonl", "9" * digits), ("s.jsonl", f'"{"9" * digits}"')):
        (tmp_path / name).write_text(f'{{"text": "a", "label": {label}}}\n{{"text": "b", "label": 0.5}}\n')
        with pytest.raises(DataError, match=r"1 bad row of 2(.|\n)*:1, column label: expected a finite number, got"):
            load_data(str(tmp_path / name), labels="numbers")


def test_versions_told_to_be_classes_keep_their_text(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\na,1.10\nb,1.1\nc,1.9\n")
    assert load_data(str(tmp_path / "t.csv"), labels="classes").labels == ("1.1", "1.10", "1.9")


def test_many_whole_numbers_must_be_said_to_be_classes_or_amounts(tmp_path):
    """Years and prices are no classes, 150 intents are; a table that could be both is asked about, in every format."""
    years = [1950 + at for at in range(40)] * 5
    for suffix in FORMATS:
        path = write(tmp_path / f"y.{suffix}", years)
        with pytest.raises(
            DataError, match=r"40 different whole numbers from 1950 to 1989 in 200 rows.*data\.labels=numbers"
        ):
            load_data(path)
        assert load_data(path, labels="numbers").kind == "regress"
        assert len(load_data(path, labels="classes").labels) == 40
    intents = [*range(150)] * 3
    assert len(read_labels(intents).classes) == 150
    assert len(read_labels([at for at in intents if at % 3]).classes) == 100  # some of them missing
    assert len(read_labels([*range(1, 78)] * 5).classes) == 77
    for amounts in ([*range(150)], [at * 10 for at in range(30)] * 4, [*range(18, 90)] * 4):
        with pytest.raises(DataError, match="classes or amounts"):
            read_labels(amounts)
    assert len(read_labels([1950 + at for at in range(20)]).classes) == 20  # few enough to see them all on screen


def test_a_decimal_comma_is_refused_and_never_a_class(tmp_path):
    (tmp_path / "t.csv").write_text("text;label\na;3,5\nb;4\nc;1,25\n")
    with pytest.raises(DataError, match="decimal comma, such as 1,25"):
        load_data(str(tmp_path / "t.csv"))
    assert load_data(str(tmp_path / "t.csv"), labels="classes").labels == ("4", "1,25", "3,5")


def test_a_label_that_is_a_list_or_an_object_is_a_bad_row(tmp_path):
    lines = [
        {"text": "a", "label": 1},
        {"text": "b", "label": 2},
        {"text": "c", "label": [1]},
        {"text": "d", "label": {}},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(
        DataError, match=r"2 bad rows of 4(.|\n)*:3, column label: expected a class name or number, got a list"
    ):
        load_data(str(tmp_path / "t.jsonl"))
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, [*lines[:2], {"text": "e"}])))
    with pytest.raises(DataError, match=r":3, column label: missing field"):
        load_data(str(tmp_path / "m.jsonl"))


def test_an_empty_text_beside_another_is_one_in_every_format(tmp_path):
    for suffix in FORMATS:
        table = pandas.DataFrame({"text1": ["a", "b", None], "text2": ["c", None, None], "label": ["x", "y", "x"]})
        path = tmp_path / f"t.{suffix}"
        if suffix in ("csv", "tsv"):
            table.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
        elif suffix == "parquet":
            table.to_parquet(path)
        else:
            table.to_json(path, orient="records", lines=suffix == "jsonl")
        with pytest.raises(DataError, match=r"1 bad row of 3(.|\n)*column text1: empty text"):
            load_data(str(path))
        assert [row.texts for row in rows_of(load_data(str(path), bad_rows="skip"))] == [("a", "c"), ("b", "")]


def test_a_parquet_file_of_the_hub_keeps_its_class_names(tmp_path):
    """``datasets`` keeps a ClassLabel's names beside the table: the file and the hub are one task, even of odd names."""
    import datasets

    names = ["1.5", "10.5", "9.5"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [0, 1, 2, 1]}, features=features)
    table.to_parquet(tmp_path / "t.parquet")
    task = load_data(str(tmp_path / "t.parquet"))
    assert (task.kind, task.labels) == ("classify", ("1.5", "9.5", "10.5"))
    assert [task.labels[row.label] for row in rows_of(task)] == ["1.5", "10.5", "9.5", "10.5"]
    unlabeled = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]}, features=features)
    unlabeled.to_parquet(tmp_path / "u.parquet")
    with pytest.raises(DataError, match=r"1 bad row of 3(.|\n)*empty label"):
        load_data(str(tmp_path / "u.parquet"))


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
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    with pytest.raises(
        ConfigError, match=r"data\.labels=numbers is for rows with a label, but .* holds prompt-completion"
    ):
        load_data(str(tmp_path / "p.jsonl"), labels="numbers")
    with pytest.raises(ConfigError, match=r"unknown data\.labels 'number'; nearest: numbers"):
        load_data(str(tmp_path / "p.jsonl"), labels="number")


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


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("trained", "labels"), [(("regress", ()), ()), (("classify", ORDER), ORDER), (("classify", ()), ("1", "7"))]
)
def test_every_format_is_read_as_the_model_was_trained(tmp_path, suffix, trained, labels):
    path = write(tmp_path / f"a{suffix if suffix[0] == '.' else '.' + suffix}", [7, 1, 7])
    task = load_data(path, eval_data=path, trained=trained)
    assert (task.kind, task.labels) == (trained[0], labels)
    expected = [labels.index(str(value)) for value in (7, 1, 7)] if labels else [7.0, 1.0, 7.0]
    assert [row.label for row in task.splits["train"]] == expected


def test_a_classifier_without_names_for_its_classes_still_has_classes(tmp_path):
    path = write(tmp_path / "a.csv", [1.5, 0.5])
    assert load_data(path, eval_data=path).kind == "regress"
    task = load_data(path, eval_data=path, trained=("classify", ()))
    assert (task.kind, task.labels) == ("classify", ("0.5", "1.5"))

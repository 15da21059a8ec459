"""Labels that differ only in how they are written."""

from __future__ import annotations

import json

import pytest
from recipes_helpers import classification, write_jsonl, write_recipe

from lily.errors import LilyError
from lily.recipes import data, loader
from lily.recipes.data.labels import alike

SIMILAR = [
    ("pos", "pos "),
    ("pos", "\tpos"),
    ("pos", "Pos"),
    ("pos", "\uff30\uff2f\uff33"),
    ("pos", "p\u200bos"),
    ("pos", "\ufeffpos"),
    ("pos", "pos\xa0"),
    ("very good", "very  good"),
    ("very good", "very\u202fgood"),
    ("caf\u00e9", "cafe\u0301"),
    ("straße", "STRASSE"),
    ("non-fiction", "non\u2011fiction"),
    ("don't", "don\u2019t"),
    ("❤", "❤\ufe0f"),
    ("1", "1.0"),
    ("1", "True"),
    ("0.0", "false"),
]
SEPARATE = [("pos", "neg"), ("m2", "m²"), ("01", "1"), ("1", "10"), ("a-b", "a b"), ("None", "0"), ("true", "0")]


def splits(encoder, folder, labels, *overrides):
    table = [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(40)]
    path = write_recipe(folder, classification(encoder, write_jsonl(folder / "t.jsonl", table), folder))
    return data.load_splits(loader.load_recipe(path, list(overrides)))


@pytest.mark.parametrize(("label", "other"), SIMILAR)
def test_labels_that_differ_only_in_how_they_are_written_are_refused(encoder, tmp_path, label, other):
    with pytest.raises(LilyError, match=r"differ only in spaces, case or notation.*data\.similar_labels: merge"):
        splits(encoder, tmp_path, ["zero", label, other, label])
    merged = splits(encoder, tmp_path, ["zero", label, other, label], "data.similar_labels=merge")
    assert set(merged.labels) == {"zero", label}
    assert any("labels were merged" in note for note in merged.notes)
    kept = splits(encoder, tmp_path, ["zero", label, other, label], "data.similar_labels=keep")
    assert set(kept.labels) == {"zero", label, other}


@pytest.mark.parametrize(("label", "other"), SEPARATE)
def test_other_labels_are_separate_classes(encoder, tmp_path, label, other):
    assert alike(label) != alike(other)
    assert len(splits(encoder, tmp_path, ["zero", label, other]).labels) == 3


def test_labels_of_json_and_of_every_file_are_compared(encoder, tmp_path):
    with pytest.raises(LilyError, match=r"'1' \(10 rows\) and 'True' \(10 rows\)"):
        splits(encoder, tmp_path, [True, 1, "x", "y"])
    write_jsonl(tmp_path / "v.jsonl", [{"text": "a", "label": "pos "}])
    validation = f"data.validation={{path: {tmp_path / 'v.jsonl'}}}"
    with pytest.raises(LilyError, match=r"'pos' \(20 rows\) and 'pos ' \(1 row\)"):
        splits(encoder, tmp_path, ["pos", "neg"], validation)
    merged = splits(encoder, tmp_path, ["pos", "neg"], validation, "data.similar_labels=merge")
    assert merged.validation == [{"text": "a", "label": "pos"}]
    with pytest.raises(LilyError, match=r"'pos' \(10 rows\) and 'pos ' \(10 rows\)"):  # before a class is chosen
        splits(encoder, tmp_path, ["pos", "neg", "pos ", "x"], "data.classes=[pos, neg]")


def test_labels_that_look_the_same_are_shown_with_escapes(encoder, tmp_path):
    with pytest.raises(LilyError) as caught:
        splits(encoder, tmp_path, ["caf\u00e9", "cafe\u0301", "x"])
    assert r"'cafe\u0301'" in str(caught.value)


def test_a_file_that_is_judged_later_has_the_same_classes():
    rows = [{"label": "Pos "}, {"label": "neg"}]
    with pytest.raises(LilyError, match="has the label 'Pos '"):
        data.check_labels(rows, ("neg", "pos"), "t.csv")
    data.check_labels(rows, ("neg", "pos"), "t.csv", merge=True)
    assert [row["label"] for row in rows] == ["pos", "neg"]


HALF = "cut \ud83d"


@pytest.mark.parametrize(
    ("row", "columns", "column"),
    [
        ({"text": HALF, "label": "a"}, {"text": "text", "label": "label"}, "text"),
        ({"text": "x", "label": HALF}, {"text": "text", "label": "label"}, "label"),
        ({"text": "x", "b": HALF, "label": "a"}, {"text": "text", "text_pair": "b", "label": "label"}, "b"),
        ({"a": {"b": HALF}, "label": "a"}, {"text": "a.b", "label": "label"}, "a.b"),
        ({"q": HALF, "a": "x"}, {"prompt": "q", "completion": "a"}, "q"),
        ({"q": "x", "a": HALF}, {"prompt": "q", "completion": "a"}, "a"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_half_a_surrogate_pair_is_refused_with_its_row_and_column(encoder, tmp_path, row, columns, column, ending):
    whole = json.loads(json.dumps(row).replace("\\ud83d", "\\ud83d\\ude00"))
    table = [whole] * 3 + [row] * 2
    path = tmp_path / f"t.{ending}"
    text = "".join(json.dumps(r) + "\n" for r in table) if ending == "jsonl" else json.dumps(table)
    path.write_text(text)
    values = classification(encoder, path, tmp_path)
    values["task"] = "text-classification" if "label" in columns else "sft"
    values["data"]["columns"] = columns
    recipe = loader.load_recipe(write_recipe(tmp_path, values))
    with pytest.raises(LilyError, match=rf"row 4: column '{column}' holds half of a surrogate pair.*\\ud83d") as caught:
        data.load_splits(recipe)
    str(caught.value).encode()  # can be printed

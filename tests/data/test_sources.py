from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from ernietune.data.formats import to_conversation
from ernietune.data.sources import open_source, read_records, without_nulls
from ernietune.errors import DataError
from ernietune.media.image import open_image


def test_json_lines_are_read_by_number_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"n": 1}\n\n{"n": "中文"}\r\n   \n{"n": 3}'.encode())
    source = open_source(path)
    assert len(source) == 3
    assert [source.read(index) for index in (2, 0, 1)] == [{"n": 3}, {"n": 1}, {"n": "中文"}]
    assert [source.where(index) for index in range(3)] == [f"{path}:1", f"{path}:3", f"{path}:5"]
    assert source.folder == tmp_path


def test_a_byte_order_mark_is_no_part_of_the_record(tmp_path: Path) -> None:
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_bytes(b'\xef\xbb\xbf{"n": 1}\n{"n": 2}\n')
    array.write_bytes(b'\xef\xbb\xbf[{"n": 1}, {"n": 2}]')
    assert [record for record, _ in read_records(lines)] == [{"n": 1}, {"n": 2}]
    assert [record for record, _ in read_records(array)] == [{"n": 1}, {"n": 2}]


def test_an_array_gives_the_line_of_each_element(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    records = [{"text": "é中\n"}, {"nested": [1, {"a": []}]}, "plain"]
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = path.read_text(encoding="utf-8").split("\n")
    read = list(read_records(path))
    assert [record for record, _ in read] == records
    for record, where in read:
        line = lines[int(where.rsplit(":", 1)[1]) - 1]
        assert line.strip()[0] == json.dumps(record)[0]


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ('{"a": 1}\n{"a": }\n', 2, 7),
        ('{"a": 1}\n\n{"a": 1} {"a": 2}\n', 3, 10),
        ("{\n", 1, 2),
    ],
)
def test_a_malformed_line_names_line_and_column(tmp_path: Path, text: str, line: int, column: int) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        list(read_records(path))
    assert str(error.value).startswith(f"{path}:{line}: column {column}: ")


def test_a_line_that_is_not_utf8_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: byte 8 "):
        list(read_records(path))


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    source = open_source(path)
    path.unlink()
    with pytest.raises(DataError, match=r"gone.jsonl:2: the file was there .* cannot be read now"):
        source.read(1)


@pytest.mark.parametrize(
    ("text", "line"),
    [("{}", 1), ('[{"a": 1},\n]', 2), ('[{"a": 1}\n{"b": 2}]', 2), ("[1]\n\n2", 3), ("[1", 1)],
)
def test_a_malformed_array_names_the_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        open_source(path)
    assert str(error.value).startswith(f"{path}:{line}: column ")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", " \n\n"), ("a.json", "[ ]")])
def test_a_file_without_records_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="holds no records"):
        open_source(tmp_path / name)


def test_missing_and_unknown_files_say_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        open_source(tmp_path / "none.jsonl")
    (tmp_path / "a.xls").write_text("a")
    with pytest.raises(DataError, match=r"\.jsonl, \.json, \.csv or \.parquet"):
        open_source(tmp_path / "a.xls")
    with pytest.raises(DataError, match="not a folder saved by"):
        open_source(tmp_path)


def test_saved_folder_and_parquet_give_the_records_without_arrow_nulls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "train": True},
            ]
        },
        {"messages": [{"role": "user", "content": "c"}]},
    ]
    table = datasets.Dataset.from_list(records)
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "a.parquet"))
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        assert [record for record, _ in read_records(path)] == records
        assert open_source(path).where(1) == f"{path}: row 1"
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="train, test"):
        open_source(tmp_path / "splits")


def test_a_file_that_is_not_parquet_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        open_source(tmp_path / "bad.parquet")


def test_nulls_inside_lists_stay() -> None:
    assert without_nulls({"a": None, "b": [None, {"c": None, "d": 0}]}) == {"b": [None, {"d": 0}]}


def test_an_array_under_the_name_of_json_lines(tmp_path: Path) -> None:
    """ERNIEKit's picture demos are arrays in files called .jsonl."""
    path = tmp_path / "demo.jsonl"
    path.write_text('[{"n": 1},\n {"n": 2}]')
    assert list(read_records(path)) == [({"n": 1}, f"{path}:1"), ({"n": 2}, f"{path}:2")]


@pytest.fixture
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_cache")
def test_csv_cells_are_text_and_some_columns_hold_json(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        '\ufeffinstruction,output,history\n007,null,\n"a\nb","x, ""y""","[[""q"", ""a""]]"\n',
        encoding="utf-8",
    )
    assert [record for record, _ in read_records(path)] == [
        {"instruction": "007", "output": "null"},
        {"instruction": "a\nb", "output": 'x, "y"', "history": [["q", "a"]]},
    ]


@pytest.mark.usefixtures("_cache")
def test_csv_mistakes_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "json.csv").write_text('messages\n"[1,"\n')
    with pytest.raises(DataError, match=r"json\.csv: row 0: column 'messages' is not valid JSON"):
        list(read_records(tmp_path / "json.csv"))
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match=r"ragged\.csv: cannot be read as CSV .*line 3"):
        open_source(tmp_path / "ragged.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty\.csv"):
        open_source(tmp_path / "empty.csv")


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("saved", ["a.parquet", "folder"])
def test_pictures_inside_of_a_table(tmp_path: Path, saved: str) -> None:
    import datasets

    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), "blue").save(buffer, "PNG")
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "blue"}]
    records = [{"conversations": turns, "images": [{"bytes": buffer.getvalue(), "path": None}]}]
    features = datasets.Features(
        {
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
            "images": [datasets.Image()],
        }
    )
    table = datasets.Dataset.from_list(records, features=features)
    (table.to_parquet if saved.endswith("parquet") else table.save_to_disk)(str(tmp_path / saved))
    source = open_source(tmp_path / saved)
    (url,) = to_conversation(source.read(0), source.where(0)).images
    assert open_image(url).getpixel((5, 5)) == (0, 0, 255)

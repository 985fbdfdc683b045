import json
import unicodedata
from pathlib import Path

import pytest

from omninft.prompts.prompt_set import PromptSet, load_prompts, require_disjoint
from omninft.types import OmniNFTError, Prompt


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def jsonl(folder: Path, *rows: object, name: str = "prompts.jsonl") -> Path:
    return written(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def failure(path: Path) -> str:
    with pytest.raises(OmniNFTError) as caught:
        load_prompts(path)
    return str(caught.value)


def test_jsonl_fields_arrive_as_written(tmp_path: Path) -> None:
    written(tmp_path, "first.png", b"png")
    row = {
        "id": "dog-1",
        "prompt_v": "A dog runs.",
        "prompt_a": "A dog barks.",
        "prompt_av": "A dog runs and barks.",
        "category": "animals",
        "first_frame_path": "first.png",
    }
    path = jsonl(tmp_path, row)
    loaded = load_prompts(path)
    frame = str(tmp_path / "first.png")
    expected = Prompt("dog-1", "A dog runs.", "A dog barks.", "A dog runs and barks.", "animals", frame)
    assert loaded == PromptSet((expected,), str(path), ())
    assert len(loaded) == 1


def test_csv_gives_what_jsonl_gives(tmp_path: Path) -> None:
    table = 'prompt_v,prompt_a,category\n"A dog, brown, runs.",A bark.,animals\n\nA cat.,"A ""meow"".",\n'
    loaded = load_prompts(written(tmp_path, "p.csv", table))
    rows = (
        {"prompt_v": "A dog, brown, runs.", "prompt_a": "A bark.", "category": "animals"},
        {"prompt_v": "A cat.", "prompt_a": 'A "meow".', "category": None},
    )
    assert loaded.prompts == load_prompts(jsonl(tmp_path, *rows)).prompts
    assert loaded.prompts[1].prompt_av == 'A cat. A "meow".'
    assert loaded.prompts[1].category is None
    assert loaded.notes == ()


def test_txt_lines_serve_for_all_three_with_a_note(tmp_path: Path) -> None:
    loaded = load_prompts(written(tmp_path, "p.txt", "a red ball bounces\r\n\n  rain on a roof  \n"))
    assert [(p.prompt_v, p.prompt_a, p.prompt_av) for p in loaded.prompts] == [
        ("a red ball bounces",) * 3,
        ("rain on a roof",) * 3,
    ]
    assert loaded.notes == ("plain text: each line serves as prompt_v, prompt_a and prompt_av",)


def test_missing_joint_prompt_is_both_texts(tmp_path: Path) -> None:
    (prompt,) = load_prompts(jsonl(tmp_path, {"prompt_v": "A dog.", "prompt_a": "A bark."})).prompts
    assert prompt.prompt_av == "A dog. A bark."


@pytest.mark.parametrize("name", ["prompt_av", "prompt", "text"])
def test_joint_text_serves_for_missing_ones_with_a_note(tmp_path: Path, name: str) -> None:
    rows = ({name: "one"}, {name: "two"}, {"prompt_v": "seen", name: "three"})
    loaded = load_prompts(jsonl(tmp_path, *rows))
    assert [(p.prompt_v, p.prompt_a, p.prompt_av) for p in loaded.prompts] == [
        ("one", "one", "one"),
        ("two", "two", "two"),
        ("seen", "three", "three"),
    ]
    assert loaded.notes == (
        f"no prompt_v: {name} serves for it (2 rows: line 1; line 2)",
        f"no prompt_a: {name} serves for it (3 rows: line 1; line 2; line 3)",
    )


def test_ids_come_from_id_then_idx_then_content(tmp_path: Path) -> None:
    texts = {"prompt_v": "v", "prompt_a": "a"}
    rows = ({**texts, "id": "x", "idx": 5}, {**texts, "idx": 7}, {**texts, "id": 8}, {**texts, "id": None})
    loaded = load_prompts(jsonl(tmp_path, *rows))
    # First 16 hex digits of sha256('["v", "a", "v a"]').
    assert [p.id for p in loaded.prompts] == ["x", "7", "8", "43cb5a4adb3d9943"]


def test_content_ids_depend_on_content_alone(tmp_path: Path) -> None:
    rows = [{"prompt_v": f"v{n}", "prompt_a": "a"} for n in range(20)]
    forward = load_prompts(jsonl(tmp_path, *rows, name="f.jsonl"))
    backward = load_prompts(jsonl(tmp_path, *reversed(rows), name="b.jsonl"))
    assert forward.prompts == backward.prompts[::-1]
    assert len({p.id for p in forward.prompts}) == 20
    # The parts are kept apart: the same characters split elsewhere are another prompt.
    moved = [{"prompt_v": "a b", "prompt_a": "c"}, {"prompt_v": "a", "prompt_a": "b c"}]
    first, second = load_prompts(jsonl(tmp_path, *moved, name="m.jsonl")).prompts
    assert first.prompt_av == second.prompt_av
    assert first.id != second.id
    for name in ("1.png", "2.png"):
        written(tmp_path, name, b"png")
    framed = [{"prompt": "p", "first_frame_path": "1.png"}, {"prompt": "p", "first_frame_path": "2.png"}]
    assert len(load_prompts(jsonl(tmp_path, *framed, name="i.jsonl"))) == 2


def test_byte_order_mark_and_unicode_composition_do_not_change_a_prompt(tmp_path: Path) -> None:
    composed = "Un café où la pluie tombe"
    decomposed = unicodedata.normalize("NFD", composed)
    assert composed != decomposed
    plain = load_prompts(written(tmp_path, "a.txt", composed))
    marked = load_prompts(written(tmp_path, "b.txt", b"\xef\xbb\xbf" + decomposed.encode("utf-8")))
    assert marked.prompts == plain.prompts
    assert marked.prompts[0].prompt_v == composed
    table = load_prompts(written(tmp_path, "c.csv", b"\xef\xbb\xbfprompt\nrain\n"))
    assert table.prompts[0].prompt_av == "rain"


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    loaded = load_prompts(written(tmp_path, "p.txt", "one\u2028still one\x0bstill\ntwo\rthree"))
    assert [p.prompt_v for p in loaded.prompts] == ["one\u2028still one\x0bstill", "two", "three"]


def test_repeated_rows_without_ids_are_dropped_with_a_note(tmp_path: Path) -> None:
    loaded = load_prompts(written(tmp_path, "p.txt", "rain\nwind\n\nrain\nrain\n"))
    assert [p.prompt_v for p in loaded.prompts] == ["rain", "wind"]
    assert loaded.notes[1] == (
        "repeats an earlier row and was dropped (2 rows: line 4 repeats line 1; line 5 repeats line 1)"
    )
    many = load_prompts(written(tmp_path, "m.txt", "rain\n" * 9))
    assert many.notes[1].endswith("line 6 repeats line 1 and 3 more)")
    own_ids = jsonl(tmp_path, {"id": 1, "prompt": "rain"}, {"id": 2, "prompt": "rain"})
    assert len(load_prompts(own_ids)) == 2


def test_duplicate_ids_name_both_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "p.jsonl", '{"id": "1", "text": "rain"}\n\n{"idx": 1, "text": "wind"}\n')
    assert failure(path) == f"{path}:3: id: found '1', which line 1 has already; expected distinct ids"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            '{"prompt": "rain"',
            ":2: malformed JSON (Expecting ',' delimiter at column 18): found '{\"prompt\": \"rain\"'",
        ),
        ('["rain"]', ":2: found a JSON list, expected an object"),
        ('{"prompt_v": "rain"}', ":2: prompt_a: missing or empty; found prompt_v, expected prompt_a, or a prompt_av"),
        ('{"prompt_v": " ", "prompt_a": "x"}', ":2: prompt_v: found ' ', expected a text that is not empty"),
        ('{"prompt_v": 3, "prompt_a": "x"}', ":2: prompt_v: found 3 (int), expected text"),
        ('{"prompt_v": null, "prompt_a": "x"}', ":2: prompt_v: missing or empty; found prompt_a"),
        ('{"prompt": "\\ud83d"}', ":2: prompt: found half of a surrogate pair"),
        ('{"prompt": "x", "text": "y"}', ":2: text: found prompt and text, expected one of them"),
        ('{"prompt": "x", "prompt": "y"}', ":2: prompt: found twice in one row"),
        ('{"promt_v": "x"}', ":2: promt_v: unknown field, did you mean 'prompt_v'?"),
        ('{"prompt": "x", "zzz": 1}', ":2: zzz: unknown field; expected some of prompt_v, prompt_a"),
        ('{"prompt": "x", "id": true}', ":2: id: found True (bool), expected text"),
        ('{"prompt": "x", "id": ""}', ":2: id: found '', expected a text that is not empty"),
        ('{"prompt": "x", "category": 3}', ":2: category: found 3 (int), expected text"),
        ('{"prompt": "x", "first_frame_path": 3}', ":2: first_frame_path: found a int, expected a path"),
        ('{"prompt": "x", "first_frame_path": "no.png"}', ":2: first_frame_path: found 'no.png', but there is no file"),
        ('{"id": ' + "9" * 5000 + ', "prompt": "x"}', ":2: malformed JSON (Exceeds the limit"),
    ],
)
def test_bad_jsonl_row_is_named(tmp_path: Path, line: str, expected: str) -> None:
    path = written(tmp_path, "p.jsonl", '{"prompt": "fine"}\n' + line + "\n")
    assert failure(path).startswith(str(path) + expected)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("prompt_v,category\nx,y\n", ":1: prompt_a: missing column; found prompt_v, category, expected prompt_v and"),
        ("category,id\nx,y\n", ":1: prompt_v: missing column; found category, id"),
        ("prompt,promt_a\nx,y\n", ":1: promt_a: unknown field, did you mean 'prompt_a'?"),
        ("prompt,prompt\nx,y\n", ":1: prompt: found two columns of this name"),
        ('prompt_v,prompt_a\n"two\nlines",x\na,b,c\n', ":4: found 3 cells, expected 2 (prompt_v, prompt_a)"),
        ("prompt_v,prompt_a\nx\n", ":2: found 1 cells, expected 2"),
        ('prompt_v,prompt_a\nx,y\n"open,z\n', ":3: malformed CSV: unexpected end of data"),
        ("prompt_v,prompt_a\nx, \n", ":2: prompt_a: missing or empty; found prompt_v"),
    ],
)
def test_bad_csv_is_named(tmp_path: Path, table: str, expected: str) -> None:
    path = written(tmp_path, "p.csv", table)
    assert failure(path).startswith(str(path) + expected)


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "missing.jsonl"
    assert failure(path) == f"{path}: no such file"
    path = written(tmp_path, "p.yaml", "x")
    assert failure(path) == f"{path}: unknown extension '.yaml', expected one of .jsonl, .csv, .txt"
    for name, content in (("e.jsonl", ""), ("e.csv", "prompt\n"), ("e.txt", "\n \n")):
        path = written(tmp_path, name, content)
        assert failure(path) == f"{path}: found no prompts, expected at least one"
    path = written(tmp_path, "latin.txt", "rain\ncaf\u00e9 noir\n".encode("latin-1"))
    assert failure(path) == f"{path}:2: found byte 0xe9 (invalid continuation byte), expected UTF-8"
    path = written(tmp_path, "marked.txt", b"\xef\xbb\xbfrain\nwind\n\xff")
    assert failure(path) == f"{path}:3: found byte 0xff (invalid start byte), expected UTF-8"


def test_sets_that_share_a_prompt_are_refused(tmp_path: Path) -> None:
    def loaded(name: str, *texts: str) -> PromptSet:
        rows = ({"idx": n, "prompt": text} for n, text in enumerate(texts))
        return load_prompts(jsonl(tmp_path, *rows, name=name))

    train, dev = loaded("train.jsonl", "Rain falls.", "Wind."), loaded("dev.jsonl", "Snow.")
    require_disjoint(train, dev, loaded("test.jsonl", "Hail."))
    require_disjoint(train, None, None)
    test = loaded("test.jsonl", "Hail.", "a  dog", "rain\u00a0 FALLS.", "wind.")
    with pytest.raises(OmniNFTError) as caught:
        require_disjoint(train, dev, test)
    assert str(caught.value) == (
        f"the train and test prompts share 'rain\\xa0 FALLS.': id '0' in {train.source}, id '2' in {test.source}; "
        "expected disjoint sets: remove it from one of them"
    )
    with pytest.raises(OmniNFTError, match="the dev and test prompts share 'SNOW"):
        require_disjoint(train, dev, loaded("test.jsonl", "SNOW."))

"""What is written appears whole, with the permissions of its kind; what is read is bounded, and refused by name."""

import os
import stat
import struct
import threading

import pytest
import torch
import yaml
from artefacts import gguf_head

from probes import Direction, direction_between, gguf_files, load
from probes.files import inside, printable, reading, staged_file, staged_folder
from probes.gguf_files import converted
from probes.tables import Table
from probes.texts import DEPTH, read_json, read_json_lines, read_yaml


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1, "a": 2}', "x.json has the key 'a' twice. Keep one of them."),
        ('{"a": {"b": 1, "b": 1}}', "has the key 'b' twice"),
        ('{"a": NaN}', "holds NaN, which is no finite number"),
        ('{"a": -Infinity}', "holds -Infinity, which is no finite number"),
        ('{"a": 1e400}', "holds 1e400, which is no finite number"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), f"is nested deeper than {DEPTH}"),
        ("[" * 100_000, "x.json is not JSON"),
        ("9" * 5000, "holds a number that is too long to read"),
        ('{"a": 1', "x.json is not JSON: .*It may be truncated: make it again"),
        ("\ufeff{", "x.json is not JSON"),
    ],
)
def test_json_is_refused_by_name(text, sentence, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        read_json(path)
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"fine": 1}\n' + text.removeprefix("\ufeff"), encoding="utf-8")
    with pytest.raises(ValueError, match="Line 2 of .*x.jsonl"):
        list(read_json_lines(lines))


def test_a_models_config_may_hold_what_is_not_finite(tmp_path):
    (tmp_path / "config.json").write_text('\ufeff{"a": [0.0, Infinity]}', encoding="utf-8")
    assert read_json(tmp_path / "config.json", finite=False) == {"a": [0.0, float("inf")]}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: &x [1]\nb: *x\n", r"x.yaml has an anchor or an alias \(x\): write what it stands for"),
        ("a: 1\na: 2\n", "has the key 'a' twice"),
        ("a: !!set {b}\n", "has a tag"),
        ("a: !!python/name:os.system\n", "has a tag"),
        ("a: 2026-01-01\n", "which is no text, number or truth. Put it in quotes"),
        ("1: a\n", "has the key 1, which is no text"),
        ("[" * 1000, "x.yaml (is nested deeper|is not YAML)"),
        ("a: [1", "x.yaml is not YAML: .*It may be truncated: make it again"),
        ("- 1\n", "x.yaml holds no keys: it is not a recipe"),
    ],
)
def test_yaml_is_refused_by_name(text, sentence, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_yaml(tmp_path / "x.yaml", "recipe")


def test_yaml_of_plain_values_comes_back(tmp_path):
    fields = {"a": [1, 2.5, None, True, "no", "1e3", "é\u2028"], "b": {"c": {"d": []}}, "e": 1e-320, "f": "2026-01-01"}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    assert read_yaml(tmp_path / "x.yaml") == fields


def test_sizes_are_bounded_before_anything_is_read(tmp_path):
    for name, read in (("x.json", read_json), ("x.yaml", read_yaml), ("x.safetensors", Direction.load)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)  # a file with a hole: no disk is used
        with pytest.raises(ValueError, match=f"{name} has 1,099,511,627,776 bytes, and .* at most"):
            read(tmp_path / name)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    for read in (read_json, read_yaml, Direction.load, lambda path: list(read_json_lines(path))):
        with pytest.raises(ValueError, match="x.json is no regular file, but a pipe or a device"):
            read(tmp_path / "x.json")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a"),
        RuntimeError("it"),
        NotImplementedError("zip"),
        MemoryError(),
        RecursionError("x"),
        struct.error("y"),
        OverflowError("z"),
    ],
)
def test_whatever_is_raised_ends_in_a_sentence_that_names_the_file(error):
    sentence = r"^some/x.bin is not a whole list \(.+\). It may be truncated: make it again"
    with pytest.raises(ValueError, match=sentence), reading("some/x.bin", "list"):
        raise error


def test_what_the_system_refuses_keeps_its_kind(tmp_path):
    for kind, sentence in (
        (FileNotFoundError, "does not exist. Name another list"),
        (IsADirectoryError, "is a folder"),
    ):
        path = tmp_path if kind is IsADirectoryError else tmp_path / "none"
        with pytest.raises(kind, match=f"^{path} {sentence}"), reading(path, "list"):
            path.read_text(encoding="utf-8")
    (tmp_path / "x").write_text("")
    with (
        pytest.raises(PermissionError, match="x may not be read: change its permissions"),
        reading(tmp_path / "x", "y"),
    ):
        raise PermissionError(13, "Permission denied", str(tmp_path / "x"))


def test_what_a_library_lacks_is_told_as_it_is():
    with pytest.raises(ImportError, match="^pip install it$"), reading("x", "list"):
        raise ImportError("pip install it")


def test_links_that_lead_out_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "secret")
    (folder / "b").write_text("b")
    (folder / "c").symlink_to(folder / "b")
    assert inside(folder, "c") == folder / "c"
    with pytest.raises(ValueError, match="folder/a is a link to a place outside its folder. Copy the file itself"):
        inside(folder, "a")
    for name in ("", "..", "../secret", "/etc/passwd", "a\0b"):
        with pytest.raises(ValueError, match="which is not a file of its own folder"):
            inside(folder, name)


def test_no_terminal_obeys_a_text_of_a_file():
    text = "\x1b]0;mine\x07 \u202ebad \x9b2J \r\n\té€ \U0001f600"
    assert printable(text) == "\\x1b]0;mine\\x07 \\u202ebad \\x9b2J \\r\n\té€ \U0001f600"
    table = Table(("a",), (("\x1b[2J",),), "\x1b[31m")
    assert "\x1b" not in str(table)
    assert "\\x1b[2J" in str(table)


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_what_is_written_has_the_permissions_that_the_umask_leaves(umask, tmp_path):
    before = os.umask(umask)
    try:
        with staged_folder(tmp_path / "folder") as stage:
            (stage / "file").write_text("")
        with staged_file(tmp_path / "file") as stage:
            stage.write_text("")
            stage.chmod(0o600)  # as a library that writes by way of a temporary file leaves it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


def test_of_two_writers_of_one_folder_the_second_is_told(tmp_path):
    told = pytest.raises(FileExistsError, match="folder exists. Name another output folder")
    with told, staged_folder(tmp_path / "folder") as stage:
        (stage / "a").write_text("")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "b").write_text("")


def test_of_two_first_loads_of_a_gguf_file_one_converts_and_both_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    began, calls, found = threading.Event(), [], []

    def convert(file, folder):
        calls.append(file)
        began.set()
        with staged_folder(folder) as stage:
            threading.Event().wait(0.05)
            (stage / "model.safetensors").write_text("")

    monkeypatch.setattr(gguf_files, "_convert", convert)
    file = gguf_head(tmp_path)
    loads = [threading.Thread(target=lambda: found.append(converted(file))) for _ in range(4)]
    for thread in loads:
        thread.start()
    for thread in loads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 4
    assert len(set(found)) == 1


def test_no_code_of_a_folder_is_run_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config",'
                                          ' "AutoModelForCausalLM": "mine.Model"}}')  # fmt: skip
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')")
    with pytest.raises(ValueError, match=str(tmp_path)):
        load(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_direction_of_a_stream_of_zeros_prints():
    direction = direction_between(load("organism"), ["a 3 quick"], ["a 3"], "L2.resid_post")
    still = Direction(direction.site, torch.ones(96), 0.0, direction.provenance)
    assert "nan of the stream" in repr(still)

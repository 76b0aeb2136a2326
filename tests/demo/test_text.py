"""The text: splits that share nothing, the same every time, no fuss about broken or missing files."""

import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from kvcalib.demo import documents, text

SENTENCE = "The {} of the method is that it can be used by any of the functions which are in this module."


def letters(paragraph: str) -> str:
    """Another way to say that two paragraphs are the same."""
    return "".join(letter for letter in paragraph.lower() if "a" <= letter <= "z")


def paragraphs_of(texts: list[str]) -> list[str]:
    return [letters(paragraph) for document in texts for paragraph in document.split("\n\n")]


def write(folder: Path, name: str, *paragraphs: str) -> None:
    path = folder / "prose" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('"""' + "\n\n".join(paragraphs) + '\n"""\n')


def names(split: str, count: int) -> list[str]:
    """File names of a split, found with the documented rule."""
    found = []
    for place in range(10_000):
        digest = hashlib.sha256(f"prose/m{place}.py".encode()).hexdigest()
        home = int(digest[:8], 16) % 100
        if split == ("train" if home < 90 else "calibrate" if home < 95 else "evaluate"):
            found.append(f"m{place}.py")
        if len(found) == count:
            return found
    raise AssertionError("the rule gives no such names")


def many(word: str, count: int = 6) -> list[str]:
    return [SENTENCE.format(f"{word} {chr(97 + place) * 3}") for place in range(count)]


@pytest.fixture(scope="module")
def calibrate_text() -> list[str]:
    """400 000 characters of calibration text, whose reading must be quick."""
    # As a command does it: among a suite's objects a parser's garbage takes twice as long to collect.
    code = (
        "import json, time; from kvcalib.demo import documents; began = time.process_time(); "
        "texts = documents('calibrate', 400_000); print(json.dumps([time.process_time() - began, texts]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, texts = json.loads(done.stdout)
    assert seconds < 10  # 3 s on 2 cores of an AMD EPYC
    return texts


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `prose` is the only package that is read, with an empty standard library."""
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(text, "PACKAGES", ("prose", "a_package_that_is_not_installed"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "stdlib")})
    return tmp_path


@pytest.fixture
def stdlib_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PACKAGES", ())


def test_installed_calibrate_and_evaluate_share_no_paragraph(calibrate_text: list[str]) -> None:
    calibrate, evaluate = paragraphs_of(calibrate_text), paragraphs_of(documents("evaluate"))
    assert len(calibrate) > 500
    assert len(evaluate) > 500
    assert not set(calibrate) & set(evaluate)


@pytest.mark.usefixtures("stdlib_only")
def test_three_splits_of_the_standard_library_share_no_paragraph_and_repeat_none() -> None:
    found = [paragraphs_of(documents(split)) for split in ("train", "calibrate", "evaluate")]
    assert all(len(each) > 30 for each in found)
    everything = [paragraph for each in found for paragraph in each]
    assert len(everything) == len(set(everything))


@pytest.mark.usefixtures("stdlib_only")
def test_split_sizes_are_about_90_5_5_of_the_files() -> None:
    files = text._files()
    total = sum(map(len, files.values()))
    assert len(files["train"]) / total == pytest.approx(0.9, abs=0.05)
    assert len(files["calibrate"]) / total == pytest.approx(0.05, abs=0.03)
    assert not set(files["train"]) & {*files["calibrate"], *files["evaluate"]}
    assert not set(files["calibrate"]) & set(files["evaluate"])


def test_a_shared_paragraph_stays_with_evaluate_then_calibrate(package: Path) -> None:
    everywhere, not_evaluate = SENTENCE.format("advantage"), SENTENCE.format("drawback")
    differently = everywhere.upper().replace(" IS THAT ", " is:  THAT, ").replace("MODULE", "module")
    write(package, names("train", 1)[0], differently, not_evaluate, *many("train"))
    write(package, names("calibrate", 1)[0], everywhere, not_evaluate, *many("calibrate"))
    write(package, names("evaluate", 1)[0], everywhere, *many("evaluate"))
    (train,), (calibrate,), (evaluate,) = (documents(each) for each in ("train", "calibrate", "evaluate"))
    assert train.split("\n\n") == many("train")
    assert calibrate.split("\n\n") == [not_evaluate, *many("calibrate")]
    assert evaluate.split("\n\n") == [everywhere, *many("evaluate")]


def test_a_repeated_paragraph_stays_once(package: Path) -> None:
    for place, name in enumerate(names("evaluate", 2)):
        write(package, name, SENTENCE.format("repetition"), *many(f"file {'xy'[place]}"))
    assert "\n\n".join(documents("evaluate")).count("repetition") == 1


def test_broken_files_are_passed_over(package: Path) -> None:
    good, *broken = names("evaluate", 5)
    write(package, good, *many("good"))
    prose = "\n\n".join(many("broken"))
    contents = [
        f'"""{prose}"""\ndef f(:\n'.encode(),
        f'"""{prose} \xff"""'.encode("latin-1"),
        f'"""{prose}"""\0'.encode(),
        f'"""{prose}"""\nx = {"-" * 20_000}1'.encode(),
    ]
    for name, content in zip(broken, contents, strict=True):
        (package / "prose" / name).write_bytes(content)
    (package / "prose" / names("evaluate", 6)[5]).symlink_to(package / "nowhere.py")
    assert documents("evaluate") == ["\n\n".join(many("good"))]


def test_modules_are_not_imported(package: Path) -> None:
    name = names("evaluate", 1)[0]
    write(package, name, *many("good"))
    (package / "prose" / "__init__.py").write_text("raise SystemExit('imported')")
    with (package / "prose" / name).open("a") as file:
        file.write("raise SystemExit('imported')\n")
    assert len(documents("evaluate")) == 1
    assert "prose" not in sys.modules


def test_tests_and_tiny_documents_are_left_out(package: Path) -> None:
    write(package, names("evaluate", 1)[0], SENTENCE.format("brevity"))
    for place in range(200):
        write(package, f"tests/m{place}.py", *many(f"test {place}"))
    assert documents("evaluate") == []


def test_max_chars_gives_the_beginning_of_the_split() -> None:
    whole = "\0".join(documents("evaluate", 60_000))
    some = documents("evaluate", 30_000)
    assert 29_000 < sum(map(len, some)) <= 30_000
    assert whole.startswith("\0".join(some))


def test_same_text_in_another_process() -> None:
    program = (
        "import hashlib; from kvcalib.demo import documents;"
        "print(hashlib.sha256('|'.join(documents('evaluate', 50_000)).encode()).hexdigest())"
    )
    here = hashlib.sha256("|".join(documents("evaluate", 50_000)).encode()).hexdigest()
    there = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "7"},
    )
    assert there.stdout.strip() == here


def test_prose_is_what_remains_of_a_docstring() -> None:
    docstring = textwrap.dedent(
        """\
        Return the sum of the *values* that :class:`~a.b.Stream` has read so far, as in `f(x)` [2]_.

        This is the second paragraph, and it goes over two lines, which become
        one line in the result.

        Parameters
        ----------
        size : int, optional
            The number of values that are to be read at once from the stream.

        Args:
            depth (`int`, *optional*, defaults to `len(x)`):
                How many of the levels below this one are to be read as well.
            width (int): How much of the space in a line is to be used by the text.

        >>> the_sum_of_the_values(of=the, stream=that, is_read=True)
        This is the output of the example, and it is not to be kept in the text.

        .. note:: a directive that is not to be kept, as it is in the way of the text.

        ```
        this is the code of an example and it is not to be kept in the text.
        ```

        x = [self.a[i] * b for i in range(10)]; y = {"a": 1}; return x, y.
        """
    )
    assert list(text.prose(docstring)) == [
        "Return the sum of the *values* that a.b.Stream has read so far, as in f(x).",
        "This is the second paragraph, and it goes over two lines, which become one line in the result.",
        "The number of values that are to be read at once from the stream.",
        "How many of the levels below this one are to be read as well.",
        "How much of the space in a line is to be used by the text.",
    ]


@pytest.mark.usefixtures("stdlib_only")
def test_the_standard_library_alone_is_enough_to_calibrate_and_evaluate() -> None:
    for split in ("calibrate", "evaluate"):
        assert sum(map(len, documents(split))) > 20_000


def test_most_words_are_english(calibrate_text: list[str]) -> None:
    sample = "\n".join(calibrate_text)
    assert len(re.findall(r"[A-Za-z ]", sample)) > 0.9 * len(sample)
    assert len(re.findall(r"\b(?:the|of|a|is|to|and|in)\b", sample)) > 0.15 * len(sample.split())


@pytest.mark.parametrize(
    ("split", "max_chars", "message"),
    [
        ("test", None, "split is 'test', expected one of train"),
        ("train", 0, "max_chars is 0, expected at least 1"),
    ],
)
def test_wrong_arguments_say_what_was_expected(split: str, max_chars: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        documents(split, max_chars)  # type: ignore[arg-type]

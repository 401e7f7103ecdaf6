# SPDX-License-Identifier: Apache-2.0
"""Questions of a file asked under load, and their answers graded."""

import json
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.fake_chat import FakeChat
from tests.helpers.loadtest_runs import pictures
from vtprune_loadtest.__main__ import main
from vtprune_loadtest.asking import QuestionBook
from vtprune_loadtest.shares import wilson, wilson_of_groups

PICTURES, QUESTIONS = 6, 9


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine questions about six pictures; the answer stands in the question, and half are about colours."""
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for number in range(QUESTIONS):
        picture = number % PICTURES
        Image.new("RGB", (8, 8), (40 * picture, 0, 0)).save(folder / f"{picture}.png")
        entry = {"image": f"{picture}.png", "question": f"Number {number}?", "answer": ["x", f"the {number}"]}
        lines.append(json.dumps(entry | {"kind": "colour" if number % 2 else "count"}))
    path = folder / "mine.jsonl"
    path.write_text("\n".join(lines))
    return path


def run(
    fake: FakeChat, questions: Path, folder: Path, *arguments: str
) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    base = ["--base-url", fake.url, "--questions", str(questions), "--result-dir", str(folder), "--seed", "0"]
    status = main([*base, "--warmup", "0", *arguments])
    document = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    return status, document, lines


def asked(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"][-1]["text"])


def right_but_for(*wrong: str) -> Any:
    def says(question: str) -> str:
        number = question.split()[1].rstrip("?")
        return "nothing" if number in wrong else f"{number}."

    return says


def test_answers_are_graded(
    fake: FakeChat, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.says = right_but_for("0", "3")
    status, document, lines = run(fake, questions, tmp_path, "--num-prompts", "12", "--no-plots")
    assert status == 0
    for body in fake.bodies:
        assert len(pictures(body)) == 1 and body["max_tokens"] == 16 and "ignore_eos" not in body
    by_line = {number + 1: number for number in range(QUESTIONS)}
    for line in lines:
        number = by_line[line["question"]]
        assert line["kind"] == ("colour" if number % 2 else "count")
        assert line["right"] == (number not in (0, 3))
        assert line["reply"] == ("nothing" if number in (0, 3) else f"{number}.")
    (entry,) = document["results"]
    wrong = sum(not line["right"] for line in lines)
    assert wrong and entry["right"] == (12 - wrong) / 12
    assert (entry["answers_graded"], entry["answers_right"]) == (12, 12 - wrong)
    assert entry["pictures_asked_about"] == PICTURES and entry["answers_cut_off"] == 0
    expected = wilson(entry["right"] * PICTURES, PICTURES)
    assert (entry["right_low"], entry["right_high"]) == (expected.low, expected.high)
    assert sum(kind["of"] for kind in entry["right_by_kind"].values()) == 12
    assert sum(kind["right"] for kind in entry["right_by_kind"].values()) == 12 - wrong
    output = capsys.readouterr().out
    header, row = (line.split() for line in output.splitlines()[2:4])
    assert header[-1] == "right" and row[-1] == f"{100 * entry['right']:.1f}%"
    assert "95% interval" in output and "share of the answers that are right" in output
    assert "6 of 12 pictures had been sent before" in " ".join(output.split())


def test_settings_share_no_picture_until_all_have_been_sent(
    fake: FakeChat, questions: Path, tmp_path: Path
) -> None:
    fake.says = right_but_for()
    sweep = ["--sweep", "off,balanced", "--interleave", "blocks", "--rounds", "1", "--no-plots"]
    run(fake, questions, tmp_path, *sweep, "--num-prompts", "3")
    sent = [pictures(body)[0] for body in fake.bodies]
    assert len(set(sent)) == len(sent) == PICTURES
    first = [asked(body) for body in fake.bodies]
    fake.bodies.clear()
    fake.says = right_but_for()
    run(fake, questions, tmp_path, *sweep, "--num-prompts", "3")
    assert sorted(map(asked, fake.bodies)) == sorted(first), "the seed draws the order"


def test_a_file_is_gone_through_again_and_each_time_asks_another_question(questions: Path) -> None:
    book = QuestionBook(questions, "One word.", seed=1)
    assert book.pictures == PICTURES
    rounds = [[book.question(turn * PICTURES + at) for at in range(PICTURES)] for turn in range(2)]
    assert all(len({question.image for question in turn}) == PICTURES for turn in rounds)
    assert len({question.line for turn in rounds for question in turn}) == QUESTIONS
    assert all(question.text.endswith("? One word.") for question in rounds[0])
    other = QuestionBook(questions, "", seed=2)
    assert [other.question(at).line for at in range(99)] != [book.question(at).line for at in range(99)]


def test_what_got_no_answer_is_not_wrong(
    fake: FakeChat, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.says = right_but_for()
    fake.fail = {1: 503, 4: "cut"}.get  # type: ignore[assignment]
    arguments = ["--num-prompts", "6", "--concurrency", "1", "--no-plots"]
    status, document, lines = run(fake, questions, tmp_path, *arguments)
    assert status == 1
    (entry,) = document["results"]
    assert entry["right"] == 1 and entry["answers_graded"] == 4 and entry["failed"] == 2
    assert Counter("right" in line for line in lines) == {True: 4, False: 2}
    assert "2 requests got no answer; they are neither right nor wrong" in " ".join(
        capsys.readouterr().out.split()
    )


def test_cut_off_answers_are_told(fake: FakeChat, questions: Path, tmp_path: Path) -> None:
    _, document, _ = run(fake, questions, tmp_path, "--num-prompts", "3", "--output-len", "2", "--no-plots")
    (entry,) = document["results"]
    assert entry["right"] == 0 and entry["answers_cut_off"] == 3
    assert any("3 answers were cut off" in note and "(2)" in note for note in document["notes"])


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
def test_answers_right_are_drawn_over_the_rate(fake: FakeChat, questions: Path, tmp_path: Path) -> None:
    fake.says = right_but_for("0")
    arguments = ["--rate", "200,400", "--sweep", "off,balanced", "--num-prompts", "6", "--slo", "ttft:900"]
    run(fake, questions, tmp_path, *arguments)
    with Image.open(tmp_path / "answers_request_rate.png") as plot:
        assert plot.width > 2.5 * plot.height, "three panels: goodput, tokens kept, answers right"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", "Well?"], "leave out --prompt."),
        (["--images", "folder", "--prompt-words", "3"], "leave out --images, --prompt-words."),
        (["--image-size", "64", "--images-per-prompt", "2"], "leave out --image-size, --images-per-prompt."),
        (["--repeat-share", "0.5"], "leave out --repeat-share."),
        (["--ignore-eos", "on"], "leave out --ignore-eos on."),
    ],
)
def test_what_a_file_stands_for_is_refused_beside_it(
    arguments: list[str], sentence: str, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--questions", str(questions), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "--questions" in error and error.count("\n") == 1


def test_a_bad_file_is_told_before_a_server_is_asked(
    tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    for text, blamed in (
        ('{"image": "none.png", "question": "?", "answer": "x"}', "none.png cannot be opened"),
        ('{"image": "bad.jsonl", "question": "?", "answer": "x"}', "bad.jsonl cannot be opened"),
        ('{"question": "?"}', "line 1"),
        ("", "holds no question"),
    ):
        bad.write_text(text)
        assert main(["--questions", str(bad)]) == 2
        error = capsys.readouterr().err
        assert blamed in error and error.count("\n") == 1
    assert main(["--suffix", "One word."]) == 2
    assert "--questions" in capsys.readouterr().err


def test_answers_of_one_picture_count_once() -> None:
    whole = wilson_of_groups([True] * 10, ["one"] * 5 + ["other"] * 5)
    assert (whole.value, whole.high) == (1, 1) and whole.low == wilson(2, 2).low < wilson(10, 10).low
    apart = wilson_of_groups([True, False, True, True], range(4))
    assert apart == wilson(3, 4)


def test_neither_torch_nor_vllm_is_loaded() -> None:
    code = (
        "import sys, vtprune_loadtest.__main__; "
        "print([name for name in ('torch', 'transformers', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

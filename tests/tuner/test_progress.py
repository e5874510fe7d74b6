"""What a person sees while the tuner works: on a terminal, and in a file that takes its lines."""

import os
import pty
import re
import select
import subprocess
import termios
import threading
from pathlib import Path

import pytest

from tests.tuner.commands import ROOT, command
from tuner import progress
from tuner.progress import Progress, duration

pytestmark = pytest.mark.timeout(300)

FIT_STAGES = ("uniform", "sensitivity", "per layer", "alphas", "protection", "polish", "proof")


@pytest.fixture
def flags(tiny_model_dir: Path, small_data: Path, tmp_path: Path) -> list[object]:
    """A fit of the tiny model that takes seconds."""
    return [
        *("--dataset", "sums", "--data-dir", small_data, "--model", tiny_model_dir),
        *("--trials", 30, "--minutes", 2, "--examples", 2, "--holdout", 9, "--length", 128),
        *("--out", tmp_path / "made" / "sums.json"),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def in_a_file(*arguments: object) -> str:
    """What a command writes to a standard error that is no terminal."""
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def on_a_terminal(*arguments: object, columns: int) -> str:
    """What a command writes to a terminal so many columns wide."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    read: list[bytes] = []

    def reading() -> None:
        # A terminal whose other end is closed is an error to read from.
        try:
            while piece := os.read(ours, 4096):
                read.append(piece)
        except OSError:
            return

    reader = threading.Thread(target=reading)
    reader.start()
    try:
        assert process.wait(timeout=100) == 0
    finally:
        process.kill()
        process.wait()
        reader.join(timeout=10)
        os.close(ours)
    return b"".join(read).decode()


def test_a_fit_with_output_to_a_file_reports_its_stages_in_plain_lines(
    flags: list[object], tmp_path: Path
) -> None:
    output = in_a_file(*flags)
    assert "\r" not in output
    assert "\x1b" not in output
    first, data, *lines = output.splitlines()
    out = tmp_path / "made" / "sums.json"
    assert first.endswith(
        f"to sums: 7 stages ({', '.join(FIT_STAGES)}), at most 2 min of measuring and 30 trials, "
        f"after the model is loaded. Table: {out}; study: "
        f"{out.with_suffix('.journal')}."
    )
    assert data == (
        "Data: sums holds questions or prompts with answers; calibration: calibration.jsonl "
        "(80 rows), validation: validation.jsonl (120 rows). The search uses calibration, the "
        "proof validation."
    )
    begun = [line for line in lines if line.startswith("stage ")]
    named = [re.match(r"stage (\d) of 7: ([\w ]+);", line) for line in begun]
    assert [match and match.groups() for match in named] == [
        (str(number), name) for number, name in enumerate(FIT_STAGES, start=1)
    ]
    assert all(re.search(r"; at most about \d+ (s|min) left$", line) for line in begun)
    # No more than the stages: nothing took half a minute.
    assert [line for line in lines if line.startswith("stage ")] == begun
    assert not re.search(r"\d+/\d+|it/s|%\|", output)


def test_a_fit_on_a_terminal_updates_one_line_and_erases_it(flags: list[object]) -> None:
    output = on_a_terminal(*flags, columns=160)
    shown = [line for line in output.split("\r") if line.strip()]
    assert shown[0].startswith("Fitting a table for ")
    stages = [line for line in shown if "stage " in line]
    assert len(stages) > len(FIT_STAGES)
    for number, name in enumerate(FIT_STAGES, start=1):
        assert any(f"stage {number} of 7: {name}; " in line for line in stages)
    assert any(
        re.search(r"trials, best \d+\.\d+ nats on 2 examples; at most about \d+ s left", line)
        for line in stages
    )
    # The line is overwritten with blanks at the end.
    assert re.search(r"\r {40,}\r$", output)


def test_an_evaluation_shows_its_task_and_the_remaining_time(
    small_evaluation: list[object],
) -> None:
    output = in_a_file(*small_evaluation, "--shots", "0,1")
    assert "\r" not in output
    lines = output.splitlines()
    assert [line.split(";")[0] for line in lines if line.startswith("task ")] == [
        "task 1 of 2: sums, 0-shot",
        "task 2 of 2: sums, 1-shot",
    ]
    assert any("6 passes" in line for line in lines)
    assert re.search(r"task 2 of 2: sums, 1-shot; about \d+ s left", output)
    # A terminal that does not know its width.
    assert "task 1 of 1: sums, packed" in on_a_terminal(*small_evaluation, columns=0)


def test_a_terminal_of_unknown_width_shows_the_pass_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "TERMINAL_PACE_S", 0.0)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 0))
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(progress.sys, "stderr", stream)
        with Progress("task", ("sums, packed",)) as shown:
            shown.begin("sums, packed")
            shown.show("pass 2 of 3", 10.0, 5.0)
            stream.flush()
            # The kernel passes on what a terminal was sent in parts.
            shown_text = ""
            while "about 5 s left" not in shown_text:
                assert select.select([ours], [], [], 30.0)[0], shown_text
                shown_text += os.read(ours, 4096).decode()
    os.close(ours)
    assert "task 1 of 1: sums, packed; pass 2 of 3; about 5 s left" in shown_text


def test_plain_lines_appear_slowly_but_at_once_when_a_part_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("stage", ("first", "second"), about="at most") as shown:
        shown.say("What will be done.")
        shown.begin("first", 0.0, 600.0)
        for second in range(75):
            now[0] += 1
            shown.show(f"{second} done", second, 600.0 - second)
        shown.begin("second")
        shown.begin("aside")
    assert capsys.readouterr().err.splitlines() == [
        "What will be done.",
        "stage 1 of 2: first; at most 10 min left",
        "stage 1 of 2: first; 29 done; at most 10 min left",
        "stage 1 of 2: first; 59 done; at most 9 min left",
        "stage 2 of 2: second; at most 9 min left",
        "aside; at most 9 min left",
    ]


def test_a_duration_is_shown_in_fitting_units() -> None:
    said = [duration(seconds) for seconds in (0.4, 119, 120, 3600, 7300)]
    assert said == ["0 s", "119 s", "2 min", "60 min", "2 h 2 min"]

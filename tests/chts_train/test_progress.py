"""What a run shows: plain lines, or a bar on a terminal."""

import io
import sys

import pytest

from chts_train.progress import Progress, count, duration, figures

ROW = {"kind": "train", "step": 10, "loss": 2.5, "ppl": 12.18, "tokens_per_s": 23456.0, "turnover": 0.0146, "zeta": 0.1}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_figures_for_people():
    assert figures(ROW) == "loss 2.500  ppl 12.18  23.5k tokens/s  turnover 1.46%"
    assert figures({"loss": 1.0, "images_per_s": 9.0, "turnover": None}) == "loss 1.000  9 images/s"


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (61.4, "1:01"), (3600, "1:00:00"), (-1, "0:00")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("value, text", [(7, "7"), (999, "999"), (1234, "1.23k"), (5.8e7, "58M"), (2e9, "2G")])
def test_count(value, text):
    assert count(value) == text


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with Progress(100, stream=stream, lines=4) as progress:
        for step in range(10, 101, 10):
            progress.advance(step)
            progress.show(ROW | {"step": step})
        progress.message("done [bold]as it is[/bold]")
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["30/100", "60/100", "90/100", "100/100"]
    assert lines[0].startswith("step  30/100  loss 2.500  ppl 12.18") and "ETA 0:00" in lines[-2]
    assert lines[-1] == "done [bold]as it is[/bold]" and "\x1b" not in stream.getvalue()


def test_a_bar_on_a_terminal():
    stream = Terminal()
    with Progress(100, done=40, stream=stream) as progress:
        progress.advance(50)
        progress.show(ROW)
        progress.message("held-out [perplexity]")
    text = stream.getvalue()
    assert "50/100" in text and "loss 2.500  ppl 12.18  23.5k tokens/s  turnover 1.46%" in text
    assert "ETA" in text and "held-out [perplexity]" in text


def test_without_rich_a_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    stream = Terminal()
    with Progress(10, stream=stream) as progress:
        progress.advance(10)
        progress.show(ROW)
    assert stream.getvalue().startswith("step 10/10  loss")


def test_quiet():
    stream = Terminal()
    with Progress(10, stream=stream, quiet=True) as progress:
        progress.advance(10)
        progress.show(ROW)
        progress.message("x")
    assert stream.getvalue() == ""

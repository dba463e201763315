"""Logs and pictures of runs."""

import json
import sys

import pytest

from chts_train.metrics import METRICS, MetricsLog, read_metrics, update_summary
from chts_train.plots import load_run, plot_runs

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder, kind="text", updates=True, factor=1.0):
    folder.mkdir()
    log = MetricsLog(folder / METRICS)
    if kind == "text":
        log.write("start", 0, unigram_ppl=25.0)
    for step in range(10, 110, 10):
        loss = factor * (1 + 10 / step)
        speed = {"tokens_per_s": 100.0} if kind == "text" else {"images_per_s": 100.0}
        log.write("train", step, loss=loss, **({"ppl": 2.7**loss} if kind == "text" else {}), **speed)
        if step % 50 == 0:
            log.write(
                "eval", step, val_loss=loss, **({"val_ppl": 2.8**loss} if kind == "text" else {"val_accuracy": 0.5})
            )
        if updates and step % 20 == 0:
            noise = {"noise_changed_blocks": 0.05, "score_var": 9.0 * factor, "score_var_survivors": 10.0}
            log.write("update", step, zeta=0.1, turnover=0.014, **noise)
    return folder


def test_every_panel_of_a_text_run(tmp_path):
    written = plot_runs([write_run(tmp_path / "a")], tmp_path / "plots")
    names = ["loss", "perplexity", "turnover", "score_variance", "noise", "overview"]
    assert [p.name for p in written] == [f"{name}.png" for name in names]
    assert all(p.read_bytes().startswith(PNG) and p.stat().st_size > 5000 for p in written)


def test_runs_are_overlaid_and_named(tmp_path):
    """Two runs give one line each per series: look at the drawing itself."""
    from matplotlib.figure import Figure

    from chts_train.plots import PANELS, _fill

    runs = [load_run(write_run(tmp_path / name, factor=f)) for name, f in (("one", 1.0), ("two", 2.0))]
    axes = Figure().subplots()
    assert _fill(axes, PANELS[0], runs)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["one train", "one held out", "two train", "two held out"]
    assert list(axes.lines[3].get_xdata()) == [50, 100]


def test_only_what_a_run_has_is_drawn(tmp_path):
    written = plot_runs([write_run(tmp_path / "a", kind="image", updates=False)], tmp_path / "plots")
    assert [p.stem for p in written] == ["loss", "accuracy", "overview"]


def test_a_dense_run_beside_a_sparse_one(tmp_path):
    runs = [write_run(tmp_path / "dense", updates=False), write_run(tmp_path / "chts24")]
    assert "turnover.png" in [p.name for p in plot_runs(runs, tmp_path / "plots")]


def test_paths_that_are_no_run(tmp_path):
    with pytest.raises(ValueError, match="must be a run folder with metrics.jsonl, got none"):
        plot_runs([tmp_path], tmp_path)
    (tmp_path / METRICS).write_text("")
    with pytest.raises(ValueError, match="must have at least one line, got none"):
        plot_runs([tmp_path], tmp_path)


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'plotting needs the package matplotlib: pip install "chts\[train\]"'):
        plot_runs([write_run(tmp_path / "a")], tmp_path)


def test_a_line_cut_short_by_a_killed_run_is_left_out(tmp_path):
    log = MetricsLog(tmp_path / METRICS)
    log.write("train", 1, loss=2.0)
    with open(log.path, "a") as file:
        file.write('{"kind": "tra')
    assert [r["step"] for r in read_metrics(log.path)] == [1]
    log.truncate(1)
    log.write("train", 2, loss=1.0)
    assert [r["step"] for r in read_metrics(log.path)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / METRICS).write_text('{"kind": 1}\n' + json.dumps({"kind": "train", "step": 2}) + "\n")
    with pytest.raises(ValueError, match="line 1 must be a JSON object with kind and step"):
        list(read_metrics(tmp_path / METRICS))


def test_truncate_drops_later_steps(tmp_path):
    log = MetricsLog(tmp_path / METRICS)
    for step in (1, 2, 3):
        log.write("train", step)
    log.truncate(2)
    assert [r["step"] for r in read_metrics(log.path)] == [1, 2]


def test_update_summary_weighs_layers():
    keys = ("score_mean", "score_var", "score_mean_survivors", "score_var_survivors", "link_age_mean")
    small = {"links": 8, "blocks": 1, "removed": 1, "replaced": 0, "can_change_blocks": 0, "noise_changed_blocks": 1.0}
    large = {"links": 24, "blocks": 3, "removed": 2, "replaced": 4, "can_change_blocks": 2, "noise_changed_blocks": 0.0}
    summary = update_summary([small | dict.fromkeys(keys, 4.0), large | dict.fromkeys(keys, 8.0)])
    assert summary["turnover"] == 4 / 32 and summary["removed"] == 3 and summary["links"] == 32
    assert summary["noise_changed_blocks"] == 0.25 and summary["score_var"] == 7.0

"""Tables, targets, plots and comparisons from result files; README.md shows exactly what the committed files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report, targets
from benchmarks.cases import Case
from benchmarks.cli import main
from benchmarks.compare import compare
from benchmarks.cost import flops, least_bytes
from benchmarks.results import Results, default_path, resolve_path, trials_note
from benchmarks.view import View, geomean
from tests.benchmarks.synthetic import made_up


def test_readme_tables_are_those_of_the_committed_results() -> None:
    assert report.stale() == [], "run `python -m benchmarks report`"


def test_without_result_files_there_are_no_tables() -> None:
    assert report.render("all", []) == report.NOTHING and "|" not in report.NOTHING


def test_regions_are_filled_and_refreshed(tmp_path: Path) -> None:
    results = made_up(tmp_path / "imaginary.json")
    results.save()
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- report:begin linear -->\nold\n<!-- report:end linear -->\nafter\n")
    old, new = report.refresh(document, [results.path])
    assert "old" in old and "old" not in new and new.startswith("before\n") and new.endswith("after\n")
    assert "#### y = x W^T (bf16)" in new and "**geomean L**" in new
    document.write_text(new)
    assert report.refresh(document, [results.path]) == (new, new)
    with pytest.raises(ValueError, match="report region"):
        report.part("nothing", View(results))


def test_every_table_renders_with_as_many_cells_as_columns() -> None:
    tables = report.part("all", View(made_up()))
    assert len(tables) >= 13
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}, table.title
        assert table.title in table.markdown()


def test_speedups_rates_and_means_are_computed_from_the_rows() -> None:
    view = View(made_up())
    case = Case("linear", "forward", (("tokens", 8192), ("out", 4096), ("in", 4096)), "bf16")
    ours, dense = view.ms(case, "chts"), view.ms(case, "cublas")
    assert view.speedup(case, "cublas") == dense / ours
    assert view.over_best(case, ("cublas", "cusparselt")) == view.speedup(case, "cusparselt")
    assert view.teraflops(case) == pytest.approx(2 * 8192 * 4096**2 / ours / 1e9)
    assert geomean([2.0, 8.0, None]) == pytest.approx(4.0) and geomean([]) is None
    assert len(view.linear_set("L", "forward")) == 6


def test_costs_are_those_of_the_formats() -> None:
    size = (("out", 4096), ("in", 4096))
    weights = 4096 * 4096
    # bf16 values that are the operand already: read values and ids, write transposed values and both metadata.
    assert least_bytes(Case("pack", "pack_operands_shared", size, "bf16")) == weights * (1 + 1 / 16 + 1 + 2 / 8)
    assert least_bytes(Case("topology", "remove", size, "fp32")) == weights * (2 + 1 / 16 + 4 / 16)
    assert flops(Case("topology", "score", size, "fp32")) == 8 * 4096.0**3
    assert least_bytes(Case("prune", "prune14", size, "bf16")) == weights * (2 + 1 / 16)


def test_targets_are_met_or_missed_by_the_figures() -> None:
    found = {t.what.split(" (")[0]: t for t in targets.targets(View(made_up()))}
    assert found["forward and dX, geomean on L against cublas, sustained"].met is True
    assert found["update of a 4096 x 4096 layer"].met is False
    assert found["update of 11008x4096 against eager Algorithm 1"].met is None
    slow = {t.what.split(" (")[0]: t for t in targets.targets(View(made_up(factor=1.2)))}
    assert slow["forward and dX, geomean on L against cusparselt, sustained"].met is False
    assert targets.table(View(Results())) is None


def test_compare_finds_losses_and_nothing_in_equal_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert compare(made_up(), made_up())[1] == 0
    assert compare(made_up(), made_up(factor=1.03))[1] == 0
    tables, lost = compare(made_up(), made_up(factor=1.2), 5.0)
    assert lost > 100 and "slower" in tables[-1].rows[0]
    assert compare(made_up(factor=1.2), made_up())[1] == 0
    for name, factor in (("a", 1.0), ("b", 1.2)):
        made_up(tmp_path / f"{name}.json", factor).save()
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert "geomean of" in capsys.readouterr().out


def test_parts_of_one_measurement_become_one_file(tmp_path: Path) -> None:
    whole = made_up()
    half = len(whole.rows) // 2
    session = whole.environment["sessions"]
    for name, rows in (("a", whole.rows[: half + 1]), ("b", whole.rows[half:])):
        Results(whole.environment, rows, tmp_path / f"{name}.json").save()
    out = tmp_path / "whole.json"
    assert main(["merge", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(out)]) == 0
    merged = Results.load(out)
    assert merged.rows == whole.rows and merged.environment["sessions"] == session * 2
    Results(whole.environment | {"kernel_hash": "other"}, whole.rows, tmp_path / "c.json").save()
    assert main(["merge", str(tmp_path / "a.json"), str(tmp_path / "c.json"), "--out", str(out)]) == 2


def test_both_precisions_of_the_eager_update_are_shown() -> None:
    results = made_up()
    for row in results.rows:
        if row.suite == "topology" and row.provider == "eager":
            row.note += "; " + trials_note({"fp32": 3.0, "tf32": 2.0})
    view = View(results)
    table = report.part("topology", view)[0]
    case = next(c for c in view.cases("topology", "update") if c.dims == {"out": 4096, "in": 4096})
    line = next(row for row in table.rows if row[:2] == ["update", "4096x4096"])
    assert line[3] == "3 ms" and line[6] == f"{3 / view.ms(case, 'chts'):.2f}x"
    assert view.row(case, "eager").trials == {"fp32": 3.0, "tf32": 2.0} and view.row(case, "chts").trials == {}


def test_the_summary_has_means_of_the_products_and_the_update() -> None:
    (table,) = report.part("summary", View(made_up()))
    assert ["y = x W^T", "L, 6 shapes, sustained"] in [row[:2] for row in table.rows]
    assert "topology update, operands included" in [row[0] for row in table.rows]
    assert report.part("summary", View(Results())) == []


def test_compare_counts_a_case_that_no_longer_runs(tmp_path: Path) -> None:
    broken = made_up()
    row = next(r for r in broken.rows if r.provider == "chts")
    row.error, row.gpu_ms = "wrong result", None
    tables, lost = compare(made_up(), broken)
    assert lost == 1 and tables[-1].rows[0][-1] == "lost: wrong result"


def test_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw

    written = draw(made_up(), tmp_path, "imaginary")
    assert [p.name for p in written] == ["imaginary-roofline.png", "imaginary-speedup.png"]
    assert all(p.stat().st_size > 10_000 for p in written)
    assert draw(Results(), tmp_path, "empty") == []


def test_files_are_named_after_the_gpu(tmp_path: Path) -> None:
    assert default_path("NVIDIA H100 80GB HBM3").name == "h100-80gb-hbm3.json"
    assert default_path("NVIDIA A100-SXM4-40GB", quick=True).name == "a100-sxm4-40gb-quick.json"
    assert resolve_path(str(tmp_path), "NVIDIA H100 PCIe") == tmp_path / "h100-pcie.json"
    assert resolve_path("a/b.json", "x") == Path("a/b.json")


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"environment": {}, "rows": [{"suite": "linear"}]}')
    with pytest.raises(ValueError, match="result file of this suite"):
        Results.load(path)

"""Mean corruption errors against the published ones, in a summary and in a report; the LaTeX table; RobustBench's record."""

import json
import re
import runpy
from pathlib import Path

import pytest

from dtta_fast.commands.cli import main
from dtta_fast.report import read_runs
from dtta_fast.report.exchange import latex_table, model_info
from dtta_fast.runs.corruption_error import ALEXNET, ALEXNET_CLEAN, SEVERITIES, corruption_error, corruption_errors_of

write_run = runpy.run_path(str(Path(__file__).with_name("report_runs.py")))["write_run"]
# corruption errors of ResNet-50 in % and its clean error, table 1 of Hendrycks & Dietterich (2019)
RESNET = dict(zip(ALEXNET, (80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77), strict=True))
RESNET_CLEAN = 0.239
GROUPS = tuple(f"{name}{severity}" for name in ALEXNET for severity in SEVERITIES)


def errors_of(figures):
    """An error for each severity, whose mean is the figure."""
    return {f"{name}{s}": figures[name] + 0.01 * (s - 3) for name in ALEXNET for s in SEVERITIES}


def test_alexnet_is_1():
    found = corruption_error(errors_of(ALEXNET), ALEXNET_CLEAN)
    assert found.mean == pytest.approx(1)
    assert found.relative == pytest.approx(1)
    assert set(found.of) == set(ALEXNET)


def test_resnet_50_has_its_published_errors():
    found = corruption_error(errors_of({name: ce / 100 * ALEXNET[name] for name, ce in RESNET.items()}), RESNET_CLEAN)
    assert {name: round(100 * value) for name, value in found.of.items()} == RESNET
    assert found.mean == pytest.approx(0.767, abs=0.005)  # mCE 76.7 and relative mCE 105.0 in the paper; its table is rounded to 1 %
    assert found.relative == pytest.approx(1.05, abs=0.005)


def test_a_part_of_imagenet_c_has_no_mean_corruption_error():
    errors = errors_of(ALEXNET)
    for missing in ("fog3", "jpeg_compression5"):
        assert corruption_error({name: error for name, error in errors.items() if name != missing}) is None
    assert corruption_error({**errors, "saturate5": 0.9}).mean == pytest.approx(1)
    assert corruption_errors_of({name: {"images": 3} for name in errors}) == {}
    entries = corruption_errors_of({name: {"accuracy_before": 1 - e, "accuracy": 1 - e / 2} for name, e in errors.items()})
    assert (entries["mce_before"], entries["mce"]) == (pytest.approx(1), pytest.approx(0.5))


def as_on_disk(record):
    """Gives an image the place that it has below ImageNet-C's folder."""
    group = record["group"]
    record["path"] = (
        f"{group[:-1]}/{group[-1]}/n01440764/{record['image_id']}.JPEG" if group[-1].isdigit() else f"{record['image_id']}.JPEG"
    )


@pytest.fixture
def runs(tmp_path):
    """A run on ImageNet-C and one on ImageNet with the same models."""
    for name, data, groups, images in (("noise_run", "imagenet-c", GROUPS, 600), ("clean", "imagenet", ("all",), 40)):
        write_run(tmp_path / name, groups=groups, images=images, change=as_on_disk)
        for file in ("config.json", "summary.json"):
            told = json.loads((tmp_path / name / file).read_text())
            (told if file == "config.json" else told["config"])["data"] = {"name": data, "root": "/data"}
            (tmp_path / name / file).write_text(json.dumps(told))
    return [tmp_path / "noise_run", tmp_path / "clean"]


def error_by_group(folder, key):
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    found = {}
    for record in records:
        if "error" not in record:
            found.setdefault(record["group"], []).append(record[key] != record["label"])
    return {name: sum(part) / len(part) for name, part in found.items()}


def test_the_command_writes_the_page_the_table_and_the_record(runs, tmp_path, capsys):
    out = ["--out", str(tmp_path / "page.html"), "--latex", str(tmp_path / "t.tex"), "--model-info", str(tmp_path / "info")]
    main(["report", *map(str, runs), *out])
    assert capsys.readouterr().out.count("wrote") == 3
    before, after = (error_by_group(runs[0], key) for key in ("prediction_before", "prediction"))
    clean = error_by_group(runs[1], "prediction")["all"]
    figures = corruption_error(after, clean)
    page = (tmp_path / "page.html").read_text()
    for label, value in (("Mean corruption error (mCE) after", figures.mean), ("Relative mCE after", figures.relative)):
        row = page[page.index(label) :]
        assert f"{100 * value:,.1f}" in row[: row.index("</tr>")]
    info = json.loads((tmp_path / "info" / "imagenet" / "corruptions" / "noise_run.json").read_text())
    assert not (tmp_path / "info" / "imagenet" / "corruptions" / "clean.json").exists()
    assert float(info["corruptions_acc"]) == pytest.approx(100 * (1 - sum(after.values()) / len(after)), abs=0.006)
    assert float(info["corruptions_mce"]) == pytest.approx(100 * figures.mean, abs=0.006)
    assert float(info["clean_acc"]) == pytest.approx(100 * (1 - clean), abs=0.006)
    table = (tmp_path / "t.tex").read_text()
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert len({line.count("&") for line in rows}) == 1
    source = next(line for line in rows if line.startswith(r"noise\_run, source"))
    cells = [cell.strip(" \\") for cell in source.split("&")]
    noise = sum(before[f"gaussian_noise{s}"] for s in SEVERITIES) / 5
    assert cells[1] == f"{100 * noise:.1f}"
    assert cells[-1] == f"{100 * corruption_error(before).mean:.1f}"
    assert [cell.strip(" \\") for cell in next(line for line in rows if line.startswith("clean, adapted")).split("&")][-1] == "--"
    assert re.search(r"begin\{tabular\}\{lr+\}", table)


def test_runs_that_have_no_such_figures_are_refused(runs, tmp_path):
    write_run(tmp_path / "digits", groups=("fog2",))
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "digits"), "--out", str(tmp_path / "p.html"), "--model-info", str(tmp_path / "info")])
    assert not (tmp_path / "p.html").exists()
    write_run(tmp_path / "depth", "depth")
    with pytest.raises(ValueError, match="no labelled images"):
        latex_table(read_runs([tmp_path / "depth"]))
    write_run(tmp_path / "part", groups=GROUPS[5:], images=600, change=as_on_disk)
    for file in ("config.json", "summary.json"):
        told = json.loads((tmp_path / "part" / file).read_text())
        (told if file == "config.json" else told["config"])["data"] = {"name": "cifar10-c"}
        (tmp_path / "part" / file).write_text(json.dumps(told))
    with pytest.raises(ValueError, match="lacks 5 of RobustBench's 75"):
        model_info(*(lambda found: (found[0], found))(read_runs([tmp_path / "part"])))
    assert "mCE" not in latex_table(read_runs([tmp_path / "part"]))
    (runs[0] / "summary.json").unlink()
    assert "mCE" not in latex_table(read_runs(runs))  # unfinished
    with pytest.raises(SystemExit):
        main(["report", str(runs[0]), "--out", str(tmp_path / "p.html"), "--model-info", str(tmp_path / "info")])
    (tmp_path / "paper.tex").write_text(r"\documentclass{article}")
    with pytest.raises(SystemExit):  # it could be anybody's
        main(["report", str(runs[1]), "--out", str(tmp_path / "p.html"), "--latex", str(tmp_path / "paper.tex")])
    assert (tmp_path / "paper.tex").read_text() == r"\documentclass{article}"

"""`dtta env --check`: one adaptation on each device, and what is said where one fails."""

from __future__ import annotations

import json

import pytest
import torch

from dtta_fast import presets, zoo
from dtta_fast.commands.cli import main
from dtta_fast.kernels import backends
from dtta_fast.measure import device_check

CPU = torch.device("cpu")


def test_a_line_says_what_served_the_adaptation_and_how_fast(tmp_path, capsys):
    path = tmp_path / "env.json"
    main(["env", "--check", "--json", str(path)])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(path.read_text())["check"]
    assert [row["device"] for row in found] == [str(device) for device in device_check.devices()]
    cpu = found[0]
    assert (cpu["error"], cpu["difference"], cpu["precision"], cpu["steps"]) == (None, None, "float32", presets.FAST.steps)
    assert cpu["evaluations"] >= presets.FAST.steps * presets.FAST.pairs
    assert cpu["ops"].startswith(backends.serving("cpu")[0])
    assert lines[-len(found)].startswith(
        f"cpu works: 3 steps and a guard, {cpu['evaluations']} evaluations, in {cpu['milliseconds']:.0f} ms; "
    )
    assert cpu["name"] in lines[-len(found)]


def test_a_device_that_fails_is_told_in_its_line_and_by_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(device_check, "devices", lambda: [CPU, torch.device("cuda", 99)])
    with pytest.raises(SystemExit) as stop:
        main(["env", "--check"])
    assert stop.value.code == 1
    cpu, gpu = capsys.readouterr().out.splitlines()[-2:]
    assert cpu.startswith("cpu works: ")
    assert gpu.startswith("cuda:99 FAILS on a GPU that cannot be asked for its name (")


def test_an_update_that_is_not_the_cpu_s_fails(monkeypatch):
    load, calls = zoo.load, []

    def other(name):
        model, denoiser = load(name)
        calls.append(name)
        if len(calls) > 2:  # the second device computes another gradient; its classifier is the same
            with torch.no_grad():
                denoiser.network.blocks[0].mlp.fc1.weight.mul_(1.5)
        return model, denoiser

    monkeypatch.setattr(zoo, "load", other)
    first, second = device_check.check([CPU, CPU])
    assert first.error is None
    assert f"from the CPU's; at most {device_check.MOST_DIFFERENCE} is expected" in second.error
    assert "FAILS" in str(second)


def test_the_same_update_works_and_is_not_compared_where_the_cpu_failed(monkeypatch):
    load, calls = zoo.load, []
    first, second = device_check.check([CPU, CPU])
    assert (first.difference, second.difference, second.error) == (None, 0.0, None)
    assert "within 0.0e+00 of the CPU in float32" in str(second)

    def broken(name):
        calls.append(name)
        if len(calls) == 1:
            raise RuntimeError("no memory\nand more")
        return load(name)

    monkeypatch.setattr(zoo, "load", broken)
    first, second = device_check.check([CPU, CPU])
    assert (first.error, second.error, second.difference) == ("RuntimeError: no memory", None, None)


def test_an_adaptation_that_changes_nothing_fails(monkeypatch):
    monkeypatch.setattr(device_check, "COMPARED", device_check.COMPARED.replace(lr=0.0, match="off"))
    assert device_check.check([CPU])[0].error == "RuntimeError: the adaptation changed nothing"


def test_without_the_weights_of_the_zoo_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(SystemExit) as stop:
        main(["env", "--check"])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "has no weights for 'digits'" in printed.err
    assert printed.out.startswith("python ")  # what a report needs is there

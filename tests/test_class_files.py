"""What --classes takes: names, files, and imagenet."""

import json

import pytest

from dtta_fast import zoo
from dtta_fast.commands.cli import main
from dtta_fast.commands.common import names_of
from dtta_fast.data.imagenet import imagenet_classes


def test_names_files_and_imagenet(tmp_path):
    assert names_of("a cat, a dog") == ["a cat", "a dog"]
    assert names_of("imagenet") == list(imagenet_classes())
    (tmp_path / "names.TXT").write_text("cat\n\n dog, big\n")
    assert names_of(str(tmp_path / "names.TXT")) == ["cat", "dog, big"]
    (tmp_path / "list.json").write_text('["cat", "dog"]')
    assert names_of(str(tmp_path / "list.json")) == ["cat", "dog"]
    (tmp_path / "prompts.json").write_text('{"cat": "a cat.", "dog": ["a dog.", "a puppy."]}')
    assert names_of(str(tmp_path / "prompts.json")) == {"cat": ["a cat."], "dog": ["a dog.", "a puppy."]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.txt", None, "there is no such file"),
        ("a.json", "{", "is not a JSON file that can be read"),
        ("a.json", "3", "has to hold a list of names"),
        ("a.json", "[]", "has to hold a list of names"),
        ("a.json", '{"cat": []}', "has to hold a list of names"),
        ("a.json", '{"cat": [3]}', "has to hold a list of names"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as a list"),
    ],
)
def test_a_file_that_holds_none(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        names_of(str(tmp_path / name))


def test_one_name_is_too_few():
    with pytest.raises(ValueError, match="classes is 'cat'; give at least two names"):
        names_of("cat")


def test_a_clip_calibrates_by_its_own_names(tmp_path, capsys):
    """The classes of the CLIP are those of the prompts, in their order."""
    from torchvision.transforms.functional import to_pil_image

    from dtta_fast.data.digits import load_digits

    (tmp_path / "images").mkdir()
    for i, image in enumerate(load_digits("train")[0][:9]):
        to_pil_image(image).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "names.txt").write_text("\n".join(zoo.DIGITS[:4]))
    own, out = zoo.folder("open_vocabulary"), tmp_path / "c.json"
    command = ["calibrate", str(own / "diffusion"), str(tmp_path / "images"), "--out", str(out), "--classes", str(tmp_path / "names.txt")]
    main([*command, "--model", str(own / "clip")])
    assert "wrote" in capsys.readouterr().out
    assert json.loads(out.read_text())["trust"] != 1.0  # measured
    assert not (tmp_path / ".c.json.part").exists()
    main(command)
    assert json.loads(out.read_text())["trust"] == 1.0

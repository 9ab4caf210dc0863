"""The tutorials quote the scripts, their examples print what they say; pictures of a run."""

import argparse
import contextlib
import io
import pathlib
import re
import sys
import textwrap

import fabricated
import pictures
import pytest
import torch
from PIL import Image
from test_commands import SMALL, _in_empty_folder_with_textures_at_hand, fails  # noqa: F401

import common
import residual_momentum
import ressl

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {"ressl.md": "ressl.py"}


def blocks(page, language):
    """The code blocks of a page in a language, each with the block after it."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"```(\w*)\n(.*?)```", text, flags=re.S)
    after = [*found[1:], ("", "")]
    pairs = zip(found, after, strict=True)
    return [(code, below) for (name, code), (_, below) in pairs if name == language]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_is_quoted_from_the_script(page):
    script = (ROOT / PAGES[page]).read_text(encoding="utf-8")
    quotes = blocks(page, "python")
    assert len(quotes) >= 5
    for code, _ in quotes:
        assert f"\n{code}" in script, code


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_print_what_stands_below_them(page):
    examples = blocks(page, "py")
    assert examples
    for code, below in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(textwrap.dedent(code), {})
        assert printed.getvalue() == below


@pytest.mark.parametrize("page", PAGES)
def test_the_pictures_are_there_and_small(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    files = [ROOT / "docs" / name for name in re.findall(r"\]\((pictures/\S+\.png)\)", text)]
    assert len(files) >= 4
    assert sum(file.stat().st_size for file in files) < 700_000


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (ressl, ["features.png", "loss.png", "relation.png", "views.png"]),
        (residual_momentum, ["features.png", "loss.png", "teacher.png", "views.png"]),
    ],
)
def test_pictures_of_a_run(module, names, capsys):
    queue = ["--queue-size", "32"] if module is ressl else []
    module.main([*SMALL[:6], *queue, "--epochs", "2", "--amp", "off", "--output", "run"])
    capsys.readouterr()
    pictures.main(["run", "--output", "drawn"])
    assert sorted(path.name for path in pathlib.Path("drawn").iterdir()) == names
    told = capsys.readouterr().out
    for name in names:
        assert f"written: {pathlib.Path('drawn', name)}" in told
        with Image.open(f"drawn/{name}") as picture:
            assert picture.width > 500


def test_pictures_without_labels(capsys):
    fabricated.own_pictures("pictures", {"cat": (40, 0)}, side=32)
    argv = ["--data", "folder:pictures/train/cat", "--image-size", "32", "--arch", "conv4"]
    argv += ["--batch-size", "16", "--queue-size", "32", "--epochs", "1", "--output", "run"]
    ressl.main(argv)
    pictures.main(["run"])
    drawn = sorted(path.name for path in pathlib.Path("run").glob("*.png"))
    assert drawn == ["loss.png", "relation.png", "views.png"]


def test_before_training_are_the_weights_that_the_run_began_with():
    ressl.main([*SMALL[:6], "--queue-size", "32", "--epochs", "1", "--output", "run"])
    args = argparse.Namespace(**common.read_checkpoint("run")["arguments"])
    model = pictures.build_model(args)
    began = common.load_encoder("run", "untrained").state_dict()
    for encoder in (model.student.encoder, model.teacher.encoder):
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, began[name])


def test_relations_are_probabilities_over_k_training_images():
    args, _ = ressl.parse_arguments(["--queue-size", "32"])
    ressl.fit_to_data(args, 64)
    data = common.render_textures(64, 0)
    views = data.images[40:43] / 255
    p_t, p_s = pictures.relations(pictures.build_model(args), args, data, views, views)
    for p in (p_t, p_s):
        assert p.shape == (3, 32)
        torch.testing.assert_close(p.sum(dim=1), torch.ones(3))
    assert (p_t.max(dim=1).values > p_s.max(dim=1).values).all()  # the teacher's is sharper


def test_mistakes_are_one_line(capsys, monkeypatch):
    assert "no checkpoint" in fails(capsys, pictures.main, "nothing")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "needs matplotlib" in fails(capsys, pictures.main, "nothing")

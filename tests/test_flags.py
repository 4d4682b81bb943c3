"""Every flag of every script, given what it should not be: refused in one line that names it, or a working run.

A refusal is exit code 2 with nothing written. In the suite one accepted value of each flag is run, for the three
scripts that take moments. `make stress` runs all of them: DMD2_RUNS_PER_FLAG=1000 pytest tests/test_flags.py
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, make_teacher, save_net, trained_net
from hypothesis import example, given, settings
from hypothesis import strategies as st

import evaluate
import sample
import train
import train0
from support import archive, data, errors, flags, published, records, shapes
from support.classifier import Classifier, small_body
from tools import average, benchmark, export, features

RUNS_PER_FLAG = int(os.environ.get("DMD2_RUNS_PER_FLAG", 0))
SCRIPTS = {
    script.__name__.removeprefix("tools."): script
    for script in (train0, train, sample, evaluate, benchmark, features, average, export)
}
HOSTILE = (
    "nan", "inf", "-inf", "-1", "0", "-0.0", "1", "0.5", "1e-320", "1e300", "1e999", "1.5.", "1,5", "0x10", "1_0", "",
    " ", "abc", "[]", "None", "True", "9" * 400, "../..", "/", "/dev/null/x", "/proc/nothing", "x" * 5000, "é", "\n",
    "--", "$(touch x)",
)
# Small or far out of range: what lies between may be allowed, and take hours.
NUMBERS = st.one_of(
    st.integers(-8, 8), st.integers(10**13), st.floats(-8, 8), st.floats(min_value=1e13), st.just(float("nan"))
)
TEXTS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)


def parser_of(script):
    """The parser that a script makes for itself."""
    made = []

    class Seen(Exception):
        pass

    class Recording(flags.Parser):
        def parse_args(self, *_):
            made.append(self)
            raise Seen

    with pytest.MonkeyPatch.context() as patch, suppress(Seen):
        patch.setattr(flags, "Parser", Recording)
        script.parse_args([])
    return made[0]


FLAGS = [
    (name, action) for name, script in SCRIPTS.items() for action in parser_of(script)._actions
    if action.option_strings and action.nargs != 0
]
# (script, flag) -> what its refusals may say instead of naming the flag; {value} is the value refused.
NOT_NAMED = {
    ("train0", "--preset"): ["unknown preset"],
    ("train", "--preset"): ["unknown preset"],
    ("train0", "--init"): ["no checkpoint at {value}:"],
    ("train", "--init"): ["no checkpoint at {value}:"],
    ("train", "--teacher"): ["no checkpoint at {value}:"],
    ("train", "--guide"): ["no checkpoint at {value}:"],
    ("train", "--gan_features"): ["cannot read {value}:", "{value} is no network of tools.features:"],
    ("sample", "--checkpoint"): ["no checkpoint at {value}:"],
    ("sample", "--guide"): ["no checkpoint at {value}:"],
    ("evaluate", "--checkpoint"): ["no checkpoint at {value}:"],
    ("evaluate", "--guide"): ["no checkpoint at {value}:"],
    ("evaluate", "--npz"): ["cannot read {value}:"],
    ("evaluate", "--image_size"): ["cannot read none.npz:"],
    ("evaluate", "--images"): ["cannot read folder {value}:", "no images in {value}"],
    ("benchmark", "--teacher"): ["no checkpoint at {value}:"],
}
# Flags to add to the base call, without which a flag is refused whatever its value.
NEEDED = {
    ("train", "--guide"): ["--autoguidance_scale", "2"],
    ("train", "--gan_features"): ["--gan_steps", "1", "--discriminator_warmup_steps", "0"],
    ("sample", "--guide"): ["--autoguidance_scale", "2"],
    ("evaluate", "--guide"): ["--autoguidance_scale", "2"],
    ("sample", "--cfg_interval"): ["--cfg_scale", "2"],
    ("evaluate", "--image_size"): ["--npz", "none.npz"],
}
# Flags that take the place of the --checkpoint of the base call.
INSTEAD_OF_CHECKPOINT = {("evaluate", "--npz"), ("evaluate", "--images"), ("evaluate", "--image_size")}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tree, features):
    """A folder; for each script the flags of its shortest run; values for flags that accept none of the others here."""
    folder = tmp_path_factory.mktemp("flags")
    teacher, cache = str(folder / "teacher"), str(folder / "cache")
    few = ["--preset", "none", "--batch_size", "2", "--steps", "1", "--device", "cpu", "--max_minutes", "1"]
    measured = ["--feature_extractor", features, "--cache_dir", cache]
    make_teacher(teacher, tree, *few, "--label_dropout", "0.5")
    net = trained_net(channels=8, label_dim=10)
    student = save_net(folder / "student.pt", net, classes=shapes.CLASSES)
    teacher_of_shapes = save_net(folder / "shapes.pt", net, kind="teacher", classes=shapes.CLASSES)
    archive.save(Classifier(small_body(32), 128, 10), folder / "classifier.pt2", 32)
    training = [*few, "--run_dir", "run", "--overwrite", "--eval_images", "64", *measured]
    drawn = ["--dataset", "folder", "--data_dir", tree]
    base = dict(
        train0=[*drawn, "--channels", "8", *training],
        train=["--teacher", teacher, *training],
        sample=["--checkpoint", teacher, "--num_images", "2", "--num_steps", "1", "--device", "cpu"],
        evaluate=[
            "--checkpoint", teacher_of_shapes, "--dataset", "shapes", "--num_images", "256", "--num_steps", "1",
            "--batch_size", "256", "--device", "cpu", *measured,
        ],
        benchmark=[
            "--channels", "8", "--batch_size", "2", "--repeats", "1", "--parts", "teacher_step", "--device", "cpu",
        ],
        features=[*drawn, "--device", "cpu", "--epochs", "1"],
        average=[teacher, teacher, "--out", "mean.pt"],
        export=["--checkpoint", student],
    )
    valid = {
        "--init": teacher, "--guide": teacher, "--inception_weights": features, "--neighbours": "256",
        "--walk": "walk.gif", "--image_size": "64",
        "--gan_features": str(folder / "classifier.pt2"),
    }
    return folder, base, valid


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def works_with(name, action, base, valid):
    """Values that a flag must accept: its choices, its value in `valid`, and that of the base call or its default."""
    flag = action.option_strings[0]
    # Not the datasets that a run would download.
    found = [value for value in action.choices or [] if value not in published.PUBLISHED]
    found.append(valid.get(flag))
    found.append(base[name][base[name].index(flag) + 1] if flag in base[name] else action.default)
    return [str(value) for value in found if isinstance(value, str | int | float)]


LIMITS = dict(train0=1, train=1, sample=1)          # working runs for each flag, where DMD2_RUNS_PER_FLAG is not set
SEEN = {}                                           # (script, flag) -> values that were run


@pytest.fixture(scope="module", autouse=True)
def figures(request):
    """Write what `make stress` tried and how much of it failed."""
    yield
    if RUNS_PER_FLAG:
        report = dict(
            what="flags given wrong types, NaN, infinities and values out of range; each accepted value was run",
            flags=len(FLAGS), values_run=sum(map(len, SEEN.values())), flags_failed=request.session.testsfailed,
            command=f"DMD2_RUNS_PER_FLAG={RUNS_PER_FLAG} python -m pytest tests/test_flags.py",
        )
        records.write_json(ROOT / "runs" / "stress" / "flags.json", report, torch.device("cpu"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_base_call_is_accepted_and_runs(name, place, tmp_path, monkeypatch):
    """Otherwise the other test would find every value of every flag refused, and be content."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHAPES_TRAIN_IMAGES", 2048)
    SCRIPTS[name].parse_args(place[1][name])
    assert call(SCRIPTS[name], *place[1][name]) == 0


@pytest.mark.parametrize(
    ("name", "action"), FLAGS, ids=[f"{name} {action.option_strings[0]}" for name, action in FLAGS]
)
def test_a_flag_is_refused_in_one_line_that_names_it_or_works(name, action, place, capsys, monkeypatch):
    folder, base, valid = place
    script, flag, is_path = SCRIPTS[name], action.option_strings[0], getattr(action.type, "__name__", "") == "path"
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)         # its files could be taken for values of this flag
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(data, "SHAPES_TRAIN_IMAGES", 2048)
    before_flag = [*base[name], *NEEDED.get((name, flag), [])]
    if (name, flag) in INSTEAD_OF_CHECKPOINT:
        del before_flag[:2]
    accepted = set()

    def line_of_refusal(value, argv):
        before = files(folder)
        capsys.readouterr()
        code = call(script, *argv)
        err = capsys.readouterr().err
        if not code:
            return None
        assert code == 2 and len(err.splitlines()) == 1 and "error: " in err, (value, code, err)
        assert files(folder) == before, value
        return err

    @settings(max_examples=20 if RUNS_PER_FLAG else 6, deadline=None, derandomize=True, database=None)
    @given(st.one_of(NUMBERS.map(str), TEXTS))
    def check(value):
        argv = [*before_flag, *([flag, value, "5"] if action.nargs == 2 else [f"{flag}={value}"])]
        try:
            script.parse_args(argv)
        except errors.UsageError:
            err = line_of_refusal(value, argv)
            assert err, value
        else:
            accepted.add(value)
            if is_path and not Path(value).resolve().is_relative_to(work):
                return                              # it might do as it is told
            # A run takes a while: each value at most once, and until so many have worked.
            values, limit = SEEN.setdefault((name, flag), []), RUNS_PER_FLAG or LIMITS.get(name, 0)
            if value in values or len(values) >= limit or name == "export":         # whose pages come from the network
                return
            err = line_of_refusal(value, argv)
            if not err:
                values.append(value)
                return
        texts = [" ".join(text.format(value=value).split()) for text in NOT_NAMED.get((name, flag), [])]
        assert re.search(rf"{flag}(?![\w-])", err) or any(text in err for text in texts), (value, err)

    for value in (*HOSTILE, *works_with(name, action, base, valid)):
        check = example(value)(check)
    check()
    assert accepted, f"every value of {flag} was refused"


def test_a_path_may_begin_with_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [kind("~/x") for kind in (flags.path, flags.output(), flags.output("folder"))] == [f"{tmp_path}/x"] * 3
    args, _ = train0.parse_args(["--preset", "none", "--dataset", "shapes", "--run_dir=~/x", "--data_dir=~/y"])
    assert (args.run_dir, args.data_dir) == (f"{tmp_path}/x", f"{tmp_path}/y") and not os.path.exists("~")

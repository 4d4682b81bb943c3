"""Every flag of every script, given what it should not be: exit code 2, one line and nothing written, or a working run.

In the suite what is accepted is run for one value a flag, of the three scripts that take moments. All of it (`make
stress`): DMD2_RUNS_PER_FLAG=1000 pytest tests/test_flags.py
"""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, teacher_flags
from hypothesis import example, given, settings
from hypothesis import strategies as st

import evaluate
import sample
import train
import train0
from support import data, errors, flags, records
from tools import benchmark, features

RUNS_PER_FLAG = int(os.environ.get("DMD2_RUNS_PER_FLAG", 0))
SCRIPTS = {
    script.__name__.removeprefix("tools."): script for script in (train0, train, sample, evaluate, benchmark, features)
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
    (name, action.option_strings[0], action.type is flags.path)
    for name, script in SCRIPTS.items() for action in parser_of(script)._actions
    if action.option_strings and action.nargs != 0
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tree, features):
    """A folder to run in, and for each script the flags of its least run."""
    folder = tmp_path_factory.mktemp("flags")
    teacher, cache = str(folder / "teacher"), str(folder / "cache")
    few = ["--batch_size", "2", "--steps", "1", "--device", "cpu", "--max_minutes", "1"]
    measured = ["--feature_extractor", features, "--cache_dir", cache]
    assert call(train0, *teacher_flags(tree), *few, "--run_dir", teacher, "--label_dropout", "0.5") == 0
    training = [*few, "--run_dir", "run", "--overwrite", "--eval_images", "64", *measured]
    drawn = ["--dataset", "folder", "--data_dir", tree]
    base = dict(
        train0=[*drawn, "--channels", "8", *training],
        train=["--teacher", teacher, *training],
        sample=["--checkpoint", teacher, "--num_images", "2", "--num_steps", "1", "--device", "cpu"],
        evaluate=[
            "--checkpoint", teacher, "--num_images", "2048", "--num_steps", "1", "--device", "cpu", "--batch_size",
            "1024", *measured, "--dataset", "shapes",
        ],
        benchmark=["--channels", "8", "--batch_size", "2", "--repeats", "3", "--modes", "fp32", "--device", "cpu"],
        features=[*drawn, "--device", "cpu", "--epochs", "1"],
    )
    return folder, base


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


LIMITS = dict(train0=1, train=1, sample=1)         # runs for each flag
SEEN = {}                                           # (script, flag) -> values that were run


@pytest.fixture(scope="module", autouse=True)
def figures(request):
    """Of a long run, what was tried and what failed."""
    yield
    if RUNS_PER_FLAG:
        report = dict(
            what="flags given wrong types, NaN, infinities and values out of range; each accepted value was run",
            flags=len(FLAGS), values_run=sum(map(len, SEEN.values())), flags_failed=request.session.testsfailed,
            command=f"DMD2_RUNS_PER_FLAG={RUNS_PER_FLAG} python -m pytest tests/test_flags.py",
        )
        records.write_json(ROOT / "runs" / "stress" / "flags.json", report, torch.device("cpu"))


@pytest.mark.parametrize(("name", "flag", "is_path"), FLAGS, ids=[f"{name} {flag}" for name, flag, _ in FLAGS])
def test_a_flag_is_refused_in_one_line_or_works(name, flag, is_path, place, capsys, monkeypatch):
    folder, base = place
    work = folder / "work"
    work.mkdir(exist_ok=True)
    monkeypatch.chdir(work)
    monkeypatch.setattr(data, "SHAPES_TRAIN_IMAGES", 2048)
    script = SCRIPTS[name]

    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(st.one_of(NUMBERS.map(str), TEXTS))
    def check(value):
        argv = [*base[name], f"{flag}={value}"]
        try:
            script.parse_args(argv)
        except errors.UsageError:
            pass
        else:
            if is_path and not Path(value).resolve().is_relative_to(folder):
                return                              # it might do as it is told
            # A run takes a while: one a flag, and that of a value once.
            values = SEEN.setdefault((name, flag), [])
            if value in values or len(values) >= (RUNS_PER_FLAG or LIMITS.get(name, 0)):
                return
            values.append(value)
        capsys.readouterr()
        before = files(folder)
        code = call(script, *argv)
        err = capsys.readouterr().err
        if code:
            assert code == 2 and len(err.splitlines()) == 1 and "error: " in err, (value, code, err)
            assert files(folder) == before, value

    for value in HOSTILE:
        check = example(value)(check)
    check()

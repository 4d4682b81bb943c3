"""What the documents name exists: flags, files, functions, links; their tables and lines of Python are up to date."""

import ast
import contextlib
import functools
import io
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

import presets

NAMES = sorted(str(path.relative_to(ROOT)) for folder in (".", "docs", "results", "weights")
               for path in (ROOT / folder).glob("*.md"))
TEXTS = {name: (ROOT / name).read_text() for name in NAMES}
README, MAKEFILE = TEXTS["README.md"], (ROOT / "Makefile").read_text()
ELSEWHERE = {"--nproc_per_node", "--ntasks", "--logdir", "--directory"}     # torchrun's, srun's, tensorboard's, ...
SCRIPTS = [
    "train0.py", "train.py", "sample.py", "evaluate.py", "tools.features", "tools.benchmark", "tools.tables",
    "tools.export", "tools.average", "tools.plane", "tools.gradient",
]


def code(text):
    """The commands and names of a document: its indented lines and what stands between backticks, a line each."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    quoted = re.findall(r"`([^`]+)`", text)
    return re.findall(r"^    (\S.*)$", text, re.MULTILINE) + [" ".join(words.split()) for words in quoted]


@functools.cache
def flags(script):
    """The flags of `python SCRIPT` or `python -m SCRIPT`, as its own --help has them."""
    before, written = sys.argv, io.StringIO()
    sys.argv = [script, "--help"]
    try:
        with contextlib.redirect_stdout(written), pytest.raises(SystemExit):
            runpy.run_module(script.removesuffix(".py"), run_name="__main__")
    finally:
        sys.argv = before
    return set(re.findall(r"--\w+", written.getvalue()))


@functools.cache
def defined(file):
    """The names that a Python file defines: functions, classes, variables and attributes."""
    nodes = list(ast.walk(ast.parse((ROOT / file).read_text())))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)} | {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in nodes if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store)}


@pytest.mark.parametrize("name", [*NAMES, "Makefile"])
def test_every_flag_is_one_of_its_script(name):
    known = ELSEWHERE.union(*map(flags, SCRIPTS))
    recipes = re.findall(r"^\t\$\(RUN\) (\w+\.py .*)", MAKEFILE, re.MULTILINE)
    for line in code(TEXTS[name]) if name in TEXTS else [f"python {recipe}" for recipe in recipes]:
        used = set(re.findall(r"(?<![\w-])--\w+", line))
        script = re.search(r"(?:python (?:-m )?|torchrun .*?)([\w.]+\.py|tools\.\w+)", line)
        assert used <= (flags(script[1]) | ELSEWHERE if script else known), line


def test_every_preset_and_target_of_make_exists():
    lines = "\n".join(line for text in TEXTS.values() for line in code(text))
    named, targets = re.findall(r"--preset (\w+)", lines), re.findall(r"^make (\w+)", lines, re.MULTILINE)
    assert set(named) <= {*presets.STUDENT, "none", "NAME"}
    assert len(targets) > 3 and all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_and_link_exists(name):
    folder = (ROOT / name).parent
    for path in code(TEXTS[name]):
        if re.fullmatch(r"[\w/]+(\.(py|json|md)|/)", path) and not path.startswith(("runs/", "grids", "tensorboard")):
            assert (ROOT / path).exists() or (folder / path).exists(), path
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", TEXTS[name]):
        file = folder / path if path else ROOT / name
        assert file.exists(), path
        if anchor:
            headings = [re.sub(r"[^\w -]", "", x).replace(" ", "-").lower()
                        for x in re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)]
            assert anchor in headings, anchor


def test_the_maps_of_the_readme_name_what_the_files_define():
    file, found = None, []
    for first, second in re.findall(r"^\|\s*(.*?)\s*\|(.*?)\|", README, re.MULTILINE):
        file = next(iter(re.findall(r"^`(\w+\.py)`$", first)), None) if first else file
        found += [(name, file) for name in re.findall(r"`(\w+)`", second) if file]
    found += re.findall(r"`(\w+)`(?: of `\w+`)? in `([\w/]+\.py)`", " ".join(README.split()))
    assert len(found) > 12
    for name, file in found:
        assert name in defined(file), f"{name} in {file}"


def test_the_lines_of_python_run(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["images"].shape == (10, 3, 32, 32) and (tmp_path / "ten.png").stat().st_size > 1000


def test_the_tables_are_those_of_the_results():
    done = subprocess.run([sys.executable, "-m", "tools.tables", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_begins_with_a_command_and_the_results_are_few_files():
    assert any(line.startswith("    python ") for line in README.splitlines()[:15])
    assert sum(path.is_file() for path in (ROOT / "results").rglob("*")) <= 40

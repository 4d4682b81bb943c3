"""What the README claims can be found where it says: numbers and commands in results/, flags in the scripts."""

import json
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
# Links (arXiv numbers), version bounds and section numbers are no claims. A table belongs to the paragraph above it.
CLAIMS = re.sub(r"\[[^\]]*\]\([^)]*\)|>= [\d.]+|sections? [\d.]+((, | and )[\d.]+)*", "", README)
BLOCKS = re.split(r"\n\s*\n(?!\|)", CLAIMS)


def numbers(value):
    """All numbers in a JSON value, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def commands(value):
    """All strings under keys that end in "command"."""
    if isinstance(value, list):
        return [found for item in value for found in commands(item)]
    if not isinstance(value, dict):
        return []
    own = [text for key, text in value.items() if key.endswith("command") and isinstance(text, str)]
    return own + [found for item in value.values() for found in commands(item)]


def claimed(block):
    """The measured numbers of a block: those with a decimal point, code left out."""
    return re.findall(r"(?<![\w.])\d[\d,]*\.\d+(?![\w.]\d)", re.sub(r"`[^`]*`", "", block))


def measured_in(text, values):
    """Whether a printed number is one of the values, rounded as printed, as it is or in percent."""
    digits = len(text.split(".")[1])
    wanted = float(text.replace(",", ""))
    return any(round(scale * value, digits) == wanted for value in values for scale in (1, 100))


def test_there_are_claims_to_check():
    assert sum(len(claimed(block)) for block in BLOCKS) >= 5


@pytest.mark.parametrize("block", [block for block in BLOCKS if claimed(block)], ids=lambda block: block[:40])
def test_every_measured_number_is_in_the_file_that_its_paragraph_names(block):
    names = re.findall(r"results/\w+\.json", block)
    assert names, f"no file is named beside {claimed(block)}"
    reports = [json.loads((ROOT / name).read_text()) for name in names]
    values = [value for report in reports for value in numbers(report)]
    missing = [text for text in claimed(block) if not measured_in(text, values)]
    assert missing == [] and all(commands(report) for report in reports)


def test_the_check_would_see_a_wrong_number():
    assert measured_in("1.23", [1.2345]) and measured_in("98.6", [0.9861]) and measured_in("1,234.5", [1234.49])
    assert not measured_in("1.24", [1.2345]) and not measured_in("98.7", [0.9861])
    assert claimed("took 13.9 minutes, `--lr 2.5`, not 5") == ["13.9"]
    assert numbers({"a": [1, {"b": 2.5}], "c": True}) == [1, 2.5]
    assert commands({"a": {"command": "x"}, "b": [{"training_command": "y"}]}) == ["x", "y"]


def test_every_flag_in_the_readme_exists():
    scripts = "".join(path.read_text() for path in ROOT.glob("*.py"))
    known = set(re.findall(r'"(--\w+)"', scripts)) | {"--logdir", "--help", "--nproc_per_node"}
    assert set(re.findall(r"(?<![\w-])--\w+", README)) <= known


def test_every_file_in_the_readme_exists():
    for name in re.findall(r"`([\w/]+\.(?:py|json|png|md))`", README) + re.findall(r"\]\((results/[^)]+)\)", README):
        if not name.startswith("runs/") and name not in ("results/evaluation.json", "grid.png"):
            assert (ROOT / name).is_file(), name

"""What the README claims can be found where it says: numbers and commands in results/, flags in the scripts."""

import json
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def commands(value):
    """All strings under keys that end in "command"."""
    if isinstance(value, list):
        return [found for item in value for found in commands(item)]
    if not isinstance(value, dict):
        return []
    own = [text for key, text in value.items() if key.endswith("command") and isinstance(text, str)]
    return own + [found for item in value.values() for found in commands(item)]


# Blocks in one line each, without bold and table rules; a table belongs to the paragraph above it.
BLOCKS = [
    " ".join(re.sub(r"[*_]{2}|\|[-|]+\|", " ", block).split()) for block in re.split(r"\n\s*\n(?!\|)", README)
]
DEMO, SHAPES, PHOTOS = "demo", "ablation_shapes", "ablation_cifar10_jpeg"
FD, STD, ACCURACY, MINUTES = "fd/mean", "fd/std", "class_accuracy/mean", "training_minutes/mean"


def row(name, title, shown, minutes=True):
    """A row of an ablation's table: its words in README, the file, and where the numbers are."""
    seeds, spread = (3, " ± {:.2f}") if shown in ("DM loss alone", "+ GAN") else (1, "")
    words = f"| {shown} | {seeds} | {{:.2f}}{spread} | {{:.1f}} % |" + (" {:.1f} |" if minutes else " |")
    places = [FD, *([STD] if spread else []), ACCURACY, *([MINUTES] if minutes else [])]
    return words, name, [f"summary/{title}/{place}" for place in places]


# Words of README with {} for each number, the file in results/ that has them, and where; "% " for a fraction.
STATED = [
    ("teacher {:.2f}, student {:.2f}, the teacher's own single step {:.1f}", DEMO, [
        f"measured/{who}/metrics/fd@5000/mean"
        for who in ("teacher, 35 evaluations", "student, 1 evaluation", "teacher, 1 evaluation")
    ]),
    ("The demo took {:.1f} minutes", DEMO, ["minutes"]),
    *[row(name, title, shown, minutes=not title.startswith("teacher")) for name, title, shown in (
        (SHAPES, "DM loss alone (the seed's)", "DM loss alone"), (SHAPES, "+ GAN", "+ GAN"),
        (SHAPES, "+ GAN, 2 steps", "+ GAN, 2 steps"), (SHAPES, "+ GAN, 4 steps", "+ GAN, 4 steps"),
        (SHAPES, "teacher, 35 evaluations", "teacher, 35 evaluations"),
        (PHOTOS, "DM loss alone (the seed's)", "DM loss alone"), (PHOTOS, "+ GAN", "+ GAN"),
        (PHOTOS, "+ GAN, 2 steps", "+ GAN, 2 steps"), (PHOTOS, "+ GAN, 4 steps", "+ GAN, 4 steps"),
        (PHOTOS, "teacher, 1 evaluation", "teacher, 1 evaluation"),
        (PHOTOS, "teacher, 35 evaluations", "teacher, 35 evaluations"),
    )],
    ("As many fresh images of the dataset itself are at {:.2f}", "calibration_fresh_shapes", ["metrics/fd@5000/mean"]),
    ("accuracy on the real test images {:.2f} %", "calibration_test", ["% feature_network_accuracy"]),
    ("| {:,} test images | {:.2f} | {:.4f} | {:.1f} % | {:.1f} % | |", "calibration_test", [
        "num_images", *(f"metrics/{name}/mean" for name in ("fd", "kid")),
        *(f"% metrics/{name}/mean" for name in ("precision", "recall")),
    ]),
    ("| {:,} images of `shapes` | {:.2f} | {:.4f} | {:.1f} % | {:.1f} % | {:.1f} % |", "calibration_shapes", [
        "num_images", *(f"metrics/{name}@5000/mean" for name in ("fd", "kid")),
        *(f"% metrics/{name}@5000/mean" for name in ("precision", "recall", "class_accuracy")),
    ]),
    ("each script killed at {} random moments", "stress_kills", ["train0/kills"]),
    ("each script killed at {} random moments", "stress_kills", ["train/kills"]),
    ("the {} half-written files", "stress_kills", ["+ */half_written_files_left_by_kills"]),
    ("In an hour of `train.py`, {:,} steps, the memory of the last ten minutes was {:.3f} times that of the first, the "
     "speed {:.2f} times", "stress_hour", ["steps", "memory_ratio", "speed_ratio_per_cpu_second"]),
    ("And {} flags were given", "stress_flags", ["flags"]),
    ("{:,} times in all", "stress_flags", ["values_run"]),
]
# Numbers that are settings or properties of the data, and so measured nowhere.
SETTINGS = """
    50,000 steps of 256 images; 5,000 one-step images; all but a few of 5,000 images;
    5,000 images against the training set; get 50,000 images for evaluation
"""


def at(report, place):
    """The number at a/b/c in nested dicts; "% a" in percent; "+ */a" the sum over all dicts of the report."""
    if place.startswith("+ */"):
        return sum(value[place[4:]] for value in report.values() if isinstance(value, dict) and place[4:] in value)
    value = report
    for key in place.removeprefix("% ").split("/"):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return 100 * value if place.startswith("% ") else value


def stated(words, name, places):
    """The words as results/name.json would have them."""
    report = json.loads((ROOT / f"results/{name}.json").read_text())
    return words.format(*(at(report, place) for place in places))


@pytest.mark.parametrize(
    ("words", "name", "places"), STATED, ids=[f"{name}: {words[:30]}" for words, name, _ in STATED]
)
def test_the_numbers_stand_in_the_file_named(words, name, places):
    text, file = stated(words, name, places), f"results/{name}.json"
    assert any(text in block for block in BLOCKS if file in block), f"{file} says: {text}"
    assert commands(json.loads((ROOT / file).read_text()))


def test_no_other_numbers_are_claimed():
    sources = r"\[[^\]]*\]\([^)]*\)|`[^`]*`|>= [\d.]+|(sections?|equations?) [\d.]+((, | and )[\d.]+)*"
    rest = re.sub(sources, "", " ".join(BLOCKS))
    for words, name, places in STATED:
        rest = rest.replace(re.sub(r"`[^`]*`", "", stated(words, name, places)), "")
    for words in SETTINGS.split(";"):
        rest = rest.replace(" ".join(words.split()), "")
    assert re.findall(r".{30}(?<![\w.])\d+(?:\.\d+|,\d{3}| %).{10}", rest) == []


def test_every_flag_in_the_readme_exists():
    scripts = "".join(path.read_text() for path in ROOT.glob("*.py"))
    known = set(re.findall(r'"(--\w+)"', scripts)) | {"--logdir", "--help", "--nproc_per_node"}
    assert set(re.findall(r"(?<![\w-])--\w+", README)) <= known


def test_every_file_in_the_readme_exists():
    for name in re.findall(r"`([\w/]+\.(?:py|json|png|md))`", README) + re.findall(r"\]\((results/[^)]+)\)", README):
        if not name.startswith("runs/") and name not in ("results/evaluation.json", "grid.png"):
            assert (ROOT / name).is_file(), name

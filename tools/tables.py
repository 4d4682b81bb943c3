"""Fills the tables of README.md and results/README.md from the JSONs in results/.

    python -m tools.tables                          # writes what is between <!-- table: NAME --> and <!-- end -->
    python -m tools.tables --check                  # changes nothing; exit code 1 and the name of a stale table
"""

import argparse
import functools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = "README.md", "results/README.md"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@functools.cache
def report(file):
    return json.loads((ROOT / f"results/{file}.json").read_text(encoding="utf-8"))


def at(address, form=".2f", scale=1):
    """The number at "file#key/key/...", formatted; the file is below results/, without its suffix."""
    file, keys = address.split("#")
    value = functools.reduce(lambda found, key: found[key], keys.split("/"), report(file))
    return format(scale * value, form)


def percent(address):
    return at(address, ".1f", 100) + " %"


def table(head, rows):
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


NETWORKS = {
    "test_images": "the test images themselves", "guided_teacher": "teacher, shipped, guided",
    "student": "**student, shipped**", "student_gan": "model soup: it and itself after a GAN phase (`--gan_steps`)",
    "student_mean": "model soup: all four students of this teacher",
    "laptop_guided_teacher": "teacher of `make cifar10`, guided",
    "laptop_student": "**student of `make cifar10`**",
}


def measured(name, kind, *shares):
    """The distance of 10,000 images in the features of `kind`, and the metrics in shares, from evaluate.py's report."""
    file = f"cifar10/{kind}/{name}#metrics"
    fd = at(f"{file}/fd/mean", ".1f" if kind == "imagenet" else ".2f")
    return [fd, *(percent(f"{file}/{share}/mean") for share in shares)]


def sampled(name):
    """Evaluations per image, and images per second on two CPU cores; empty for the test images."""
    if name == "test_images":
        return "", ""
    network = re.sub("_(gan|mean)$", "", name)      # a student trained further is as fast
    speed = at(f"cifar10/runs#sampling/{network}", ".0f" if report("cifar10/runs")["sampling"][network] > 10 else ".1f")
    return at(f"cifar10/imagenet/{name}#checkpoint/evaluations", "d"), speed


def quality():
    head = ["", "evaluations an image", "FD-ImageNet", "FD", "class accuracy", "recall", "images/s"]
    rows = []
    for name, title in NETWORKS.items():
        if name == "student_mean":                  # only in the table `networks`
            continue
        evaluations, speed = sampled(name)
        distances = *measured(name, "imagenet"), *measured(name, "classifier", "class_accuracy", "recall")
        rows.append([title, evaluations, *distances, speed])
    return table(head, rows)


def networks():
    head = ["", "FD-ImageNet", "precision", "recall", "FD", "class accuracy", "precision", "recall"]
    return table(head, [
        [title, *measured(name, "imagenet", "precision", "recall"),
         *measured(name, "classifier", "class_accuracy", "precision", "recall")]
        for name, title in NETWORKS.items()
    ])


def cost():
    rows = {
        "`make demo`": ("2 CPU cores", "shapes/demo#"),
        "`make cifar10`": ("2 CPU cores", "cifar10/runs#make cifar10/"),
        "the shipped pair (`cifar10_gpu`, no GAN phase)": ("one H200", "cifar10/runs#"),
    }
    return table(["training", "hardware", "teacher", "student", "images/s", "memory, MiB"], [
        [title, hardware, *(at(f"{run}{who}/training_minutes", ".1f") + " min" for who in ("teacher", "student")), *(
            " and ".join(at(f"{run}{who}/{name}", ",.0f") for who in ("teacher", "student"))
            for name in ("median_images_per_second", "peak_memory_mib")
        )]
        for title, (hardware, run) in rows.items()
    ])


def curve():
    """FD-ImageNet and recall of a student over its hour of training on two CPU cores."""
    return table(["minutes", "FD-ImageNet", "recall"], [
        [format(row["minutes"], ".0f"), format(row["fd_imagenet"], ".1f"), format(100 * row["recall"], ".1f") + " %"]
        for row in report("distillation/starts")["on_64_channels"]["curve_of_L3"]
    ])


def ablation(file):
    """The ablation of DMD2's parts: FD with its standard deviation over the seeds, and class accuracy."""
    rows = []
    for title, row in report(file)["summary"].items():
        spread = f" ± {row['fd']['std']:.2f}" if row["fd"]["std"] else ""
        seeds = len(report(file)["rows"][title])
        title = title.replace("GAN", "classifier head")         # as the reports called it
        rows.append([title, str(seeds), f"{row['fd']['mean']:.2f}{spread}", f"{row['class_accuracy']['mean']:.1f} %"])
    return table(["", "seeds", "FD", "class accuracy"], rows)


STEPS = {"teacher_step": "teacher step", "both_turns": "both turns", "guidance_turn": "guidance turn alone"}


def speed():
    """A step at 32x32 and at 64x64 on two CPU cores."""
    head = ["64 images", "32x32: ms", "images/s", "share of the product", "64x64: ms", "images/s",
            "share of the product", "64x64 / 32x32"]
    rows = []
    for part, title in (STEPS | dict(gan_turn="GAN turn")).items():
        row = [title]
        for file in ("benchmark", "benchmark_64"):
            found = f"speed/{file}#parts/{part}/launched"
            row += [at(f"{found}/ms", ",.0f"), at(f"{found}/images_per_second", ".1f")]
            row += [percent(f"{found}/fraction_of_matmul")]
        files = "benchmark", "benchmark_64"
        small, large = (report(f"speed/{file}")["parts"][part]["launched"]["ms"] for file in files)
        rows.append([*row, f"{large / small:.1f}"])
    return table(head, rows)


def speed_gpu():
    head = ["512 images", "kernels", "launched: ms", "launches", "recorded: ms", "launches", "images/s", "of a product"]
    return table(head, [
        [title, at(f"speed/h200#parts/{part}/recorded/kernel_ms", ".1f"), *(
            at(f"speed/h200#parts/{part}/{mode}/{key}", form)
            for mode in ("launched", "recorded") for key, form in (("ms", ".1f"), ("launches", ",.0f"))
        ), at(f"speed/h200#parts/{part}/recorded/images_per_second", ",.0f"),
         percent(f"speed/h200#parts/{part}/recorded/fraction_of_matmul")]
        for part, title in STEPS.items()
    ])


def published():
    rows = [[str(row[key]) for key in ("method", "evaluations", "fid")] for row in report("published")["rows"]]
    return table(["", "evaluations an image", "FID"], rows)


TABLES = dict(
    quality=quality, cost=cost, networks=networks, curve=curve, speed=speed, speed_gpu=speed_gpu, published=published,
    parts_shapes=lambda: ablation("shapes/ablation"),
)


def main():
    parser = argparse.ArgumentParser(description="Fill the tables of the documents from the JSONs in results/.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table is stale")
    check = parser.parse_args().check
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        stale = [found[2] for found in MARKED.finditer(text) if found[0] != found[1] + TABLES[found[2]]() + found[3]]
        if check and stale:
            sys.exit(f"{name}: the table {stale[0]} is not what results/ has: python -m tools.tables")
        if stale:
            text = MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)
            (ROOT / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

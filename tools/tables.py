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
    return json.loads((ROOT / f"results/{file}.json").read_text())


def at(address, form=".2f", scale=1):
    """The number at "file#key/key/...", formatted; the file is below results/, without its suffix."""
    file, keys = address.split("#")
    value = functools.reduce(lambda found, key: found[key], keys.split("/"), report(file))
    return format(scale * value, form)


def percent(address):
    return at(address, ".1f", 100) + " %"


def table(head, rows):
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def measured(file):
    """Evaluations an image, FD, class accuracy and recall of 5,000 images, in a report of evaluate.py."""
    fd, accuracy, recall = (f"{file}#metrics/{name}@5000/mean" for name in ("fd", "class_accuracy", "recall"))
    return [at(f"{file}#checkpoint/evaluations", "d"), at(fd), percent(accuracy), percent(recall)]


def quality():
    rows = {
        "h100_teacher": "teacher, shipped", "h100_guided_teacher": "the same, guided",
        "h100_student": "**student, shipped**", "cpu_teacher": "teacher of `make cifar10`",
        "cpu_guided_teacher": "the same, guided and autoguided", "cpu_student": "**student of `make cifar10`**",
    }
    return table(["sampling", "evaluations an image", "FD", "class accuracy", "recall", "images/s"], [
        [title, *measured(f"cifar10_jpeg/{file}"), at(f"cifar10_jpeg/{file}#checkpoint/images_per_second", ",.0f")]
        for file, title in rows.items()
    ])


def cost():
    rows = {
        "`make demo`": ("2 CPU cores", "shapes/demo#"),
        "`make cifar10`": ("2 CPU cores", "cifar10_jpeg/runs_cpu#make cifar10/"),
        "`--preset cifar10_gpu`, teacher to step 7,647 of 12,000": ("one H100", "cifar10_jpeg/runs_h100#"),
    }
    return table(["training", "hardware", "teacher", "student", "images/s", "memory, MiB"], [
        [title, hardware, *(at(f"{run}{who}/training_minutes", ".1f") + " min" for who in ("teacher", "student")), *(
            " and ".join(at(f"{run}{who}/{name}", ",.0f") for who in ("teacher", "student"))
            for name in ("median_images_per_second", "peak_memory_mib")
        )]
        for title, (hardware, run) in rows.items()
    ])


def networks():
    cpu, h100 = "cifar10_jpeg/runs_cpu", "cifar10_jpeg/runs_h100"
    rows = [
        ("**teacher of an H100, 64 channels: shipped**", "h100_teacher", f"{h100}#teacher"),
        ("guided by 2", "h100_guided_teacher", None),
        ("its student: **shipped**", "h100_student", f"{h100}#student"),
        ("another student, on 2 CPU cores", "cpu_student_of_h100_teacher", f"{cpu}#student of the H100's teacher"),
        ("**teacher of `make cifar10`**", "cpu_teacher", f"{cpu}#make cifar10/teacher"),
        ("guided by 3 and autoguided by 2", "cpu_guided_teacher", None),
        ("its student", "cpu_student", f"{cpu}#make cifar10/student"),
        ("another, seed 1", "cpu_student_seed_1", f"{cpu}#make cifar10/student, seed 1"),
        ("**teacher of an earlier `make cifar10`**", "earlier_teacher", f"{cpu}#an earlier make cifar10/teacher"),
        ("guided by 3 and autoguided by 2", "earlier_guided_teacher", None),
        ("its student", "earlier_student", f"{cpu}#an earlier make cifar10/student"),
    ]
    return table(["", "minutes", "evaluations", "FD", "class accuracy", "recall"], [
        [title, at(f"{run}/training_minutes", ".1f") if run else "", *measured(f"cifar10_jpeg/{file}")]
        for title, file, run in rows
    ])


def parts(file):
    """What each part of DMD2 is worth: FD with its standard deviation over the seeds, and class accuracy."""
    rows = []
    for title, row in report(file)["summary"].items():
        spread = f" ± {row['fd']['std']:.2f}" if row["fd"]["std"] else ""
        seeds = len(report(file)["rows"][title])
        rows.append([title, str(seeds), f"{row['fd']['mean']:.2f}{spread}", f"{row['class_accuracy']['mean']:.1f} %"])
    return table(["", "seeds", "FD", "class accuracy"], rows)


def speed():
    rows = {"teacher step": "teacher_step", "both turns": "both_turns", "guidance turn alone": "guidance_turn"}
    return table(["64 images", "milliseconds", "images/s", "of a large bf16 product"], [
        [title, *(at(f"speed/benchmark#parts/{part}/launched/{key}", ",.0f") for key in ("ms", "images_per_second")),
         percent(f"speed/benchmark#parts/{part}/launched/fraction_of_matmul")]
        for title, part in rows.items()
    ])


def published():
    rows = [[str(row[key]) for key in ("method", "evaluations", "fid")] for row in report("published")["rows"]]
    return table(["", "evaluations an image", "FID"], rows)


TABLES = dict(
    quality=quality, cost=cost, networks=networks, speed=speed, published=published,
    parts_shapes=lambda: parts("shapes/ablation"), parts_cifar10=lambda: parts("cifar10_jpeg/ablation"),
)


def main():
    parser = argparse.ArgumentParser(description="Fill the tables of the documents from results/.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table is stale")
    check = parser.parse_args().check
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        stale = [found[2] for found in MARKED.finditer(text) if found[0] != found[1] + TABLES[found[2]]() + found[3]]
        if check and stale:
            sys.exit(f"{name}: the table {stale[0]} is not what results/ has: python -m tools.tables")
        if stale:
            (ROOT / name).write_text(MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text))


if __name__ == "__main__":
    main()

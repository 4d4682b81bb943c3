"""What each part of DMD2 is worth: trains and measures one student per row, then writes the table.

    python results/ablation.py shapes --teacher runs/demo/teacher --feature_extractor shapes_features.pt2
    python results/ablation.py cifar10_jpeg --teacher runs/c10j_teacher --feature_extractor features.pt2

Writes results/ablation_NAME.json (all figures) and results/ablation_NAME.md (the table). A row that was finished before
is not run again, so that an interrupted call goes on where it was.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SETTINGS = {
    "shapes": ["--preset", "demo", "--steps", "400"],
    "cifar10_jpeg": [
        "--steps", "300", "--batch_size", "64", "--dfake_gen_update_ratio", "2", "--generator_lr", "5e-4",
        "--guidance_lr", "3e-3", "--ema_decay", "0.97", "--lr_schedule", "cosine", "--conditioning_sigma", "3",
    ],
}
GAN = {
    "shapes": ["--gen_cls_loss_weight", "3e-2", "--diffusion_gan_max_timestep", "600"],
    "cifar10_jpeg": ["--gen_cls_loss_weight", "3e-3", "--cls_head_lr", "3e-4"],
}
ROWS = [                                            # name, flags, seeds
    ("DM loss alone (the seed's)", ["--gen_cls_loss_weight", "0"], (0, 1, 2)),
    ("+ GAN", [], (0, 1, 2)),
    ("+ GAN, 2 steps", ["--num_denoising_steps", "2"], (0,)),
    ("+ GAN, 4 steps", ["--num_denoising_steps", "4"], (0,)),
]


def training_minutes(run):
    """Minutes within the loop, grids and saves left out, from the run's own log."""
    batch_size = torch.load(run / "checkpoint.pt", weights_only=True)["settings"]["batch_size"]
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [0, *(row["step"] for row in rows)]
    spans = [after - before for before, after in itertools.pairwise(steps)]
    return sum(n * batch_size / row["images_per_second"] for n, row in zip(spans, rows, strict=True)) / 60


def measure(checkpoint, args, out, *more):
    flags = ["--feature_extractor", args.feature_extractor, "--num_images", str(args.num_images), "--out", str(out)]
    flags += ["--data_dir", args.data_dir] if args.data_dir else []
    subprocess.run([sys.executable, "evaluate.py", "--checkpoint", str(checkpoint), *flags, *more], check=True)
    return json.loads(out.read_text())


def main():
    parser = argparse.ArgumentParser(description="Train and measure a student for each part of DMD2.")
    parser.add_argument("name", choices=list(SETTINGS))
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--feature_extractor", required=True)
    parser.add_argument("--data_dir", help="where the teacher's images are, if not where it found them")
    parser.add_argument("--num_images", type=int, default=5000)
    parser.add_argument("--teacher_images", type=int, help="fewer for the teacher's 35 evaluations; default the same")
    args = parser.parse_args()
    work = Path("runs") / "ablation" / args.name
    work.mkdir(parents=True, exist_ok=True)

    results = {}
    for title, flags, seeds in ROWS:
        for seed in seeds:
            run = work / f"{title.replace(' ', '_').replace(chr(39), '')}_{seed}"
            out = run.with_suffix(".json")
            gan = GAN[args.name] if "GAN" in title else []
            command = ["train.py", *SETTINGS[args.name], *gan, *flags, "--seed", str(seed)]
            if not out.exists():
                paths = ["--teacher", args.teacher, "--run_dir", str(run), "--resume"]
                paths += ["--data_dir", args.data_dir] if args.data_dir else []
                subprocess.run([sys.executable, *command, *paths, "--sample_every", "1000000"], check=True)
                measure(run, args, out, "--seed", str(seed))
            report = json.loads(out.read_text())
            report["training_command"] = "python " + " ".join(command)
            report["training_minutes"] = round(training_minutes(run), 2)
            results.setdefault(title, []).append(report)
    for steps in (1, 18):
        out = work / f"teacher_{steps}.json"
        fewer = ["--num_images", str(args.teacher_images)] if args.teacher_images and steps > 1 else []
        if not out.exists():
            measure(args.teacher, args, out, "--num_steps", str(steps), *fewer)
        results[f"teacher, {2 * steps - 1} evaluation{'s' * (steps > 1)}"] = [json.loads(out.read_text())]

    head = ["", "seeds", "images", "FD", "class accuracy", "precision", "recall", "minutes", "command"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    summary = {}
    for title, reports in results.items():
        row = summary[title] = {}

        def mean(name, reports=reports, row=row, digits=2, scale=1):
            values = [scale * report["runs"][0][name] for report in reports]
            row[name] = dict(
                mean=statistics.mean(values), std=statistics.stdev(values) if len(values) > 1 else None
            )
            spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.{digits}f}{spread}"

        minutes = [r["training_minutes"] for r in reports if "training_minutes" in r]
        row["minutes"] = statistics.mean(minutes) if minutes else None
        lines.append(" | ".join([
            f"| {title}", ", ".join(str(r["runs"][0]["seed"]) for r in reports),
            str(reports[0]["num_images"]), mean("fd"),
            mean("class_accuracy", digits=1, scale=100) + " %", mean("precision"), mean("recall"),
            f"{statistics.mean(minutes):.1f}" if minutes else "", f"`{reports[0].get('training_command', '')}` |",
        ]))
    path = HERE / f"ablation_{args.name}.json"
    note = json.loads(path.read_text()).get("note", "") if path.exists() else ""    # written by hand
    stamp = dict(note=note, when=time.strftime("%Y-%m-%d"), summary=summary, rows=results)
    path.write_text(json.dumps(stamp, indent=1) + "\n")
    (HERE / f"ablation_{args.name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""What each part of DMD2 is worth: trains and measures one student per row, then writes the table.

    python results/ablation.py shapes --teacher runs/demo/teacher --feature_extractor shapes_features.pt2
    python results/ablation.py cifar10_jpeg --teacher runs/c10j_teacher --feature_extractor features.pt2

Writes results/ablation_NAME.json (all figures) and results/ablation_NAME.md (the table). A row that was finished before
is not run again, so that an interrupted call goes on where it was.
"""

import argparse
import itertools
import json
import shlex
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
DIVERGENCES = [                                     # their head must see every noise, not the GAN's range above
    (f"+ GAN, f_div {f_div}", ["--f_div", f_div, "--diffusion_gan_max_timestep", "1000"], (0,))
    for f_div in ("rkl", "kl", "js")
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
    flags += ["--neighbours", "10000"]
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
    parser.add_argument("--divergences", action="store_true", help="also the rows of --f_div")
    parser.add_argument("--teacher_images", type=int, help="fewer for the teacher's 35 evaluations; default the same")
    args = parser.parse_args()
    work = Path("runs") / "ablation" / args.name
    work.mkdir(parents=True, exist_ok=True)

    results = {}
    for title, flags, seeds in ROWS + DIVERGENCES * args.divergences:
        for seed in seeds:
            run = work / f"{title.replace(' ', '_').replace(chr(39), '')}_{seed}"
            out = run.with_suffix(".json")
            gan = GAN[args.name] if "GAN" in title else []
            command = ["train.py", *SETTINGS[args.name], *gan, *flags, "--seed", str(seed)]
            command += ["--teacher", args.teacher, "--run_dir", str(run), "--resume", "--sample_every", "1000000"]
            command += ["--data_dir", args.data_dir] if args.data_dir else []
            if not out.exists():
                subprocess.run([sys.executable, *command], check=True)
                report = measure(run, args, out, "--seed", str(seed))
                report["training_command"] = shlex.join(["python", *command])
                report["training_minutes"] = round(training_minutes(run), 2)
                out.write_text(json.dumps(report, indent=1) + "\n")
            results.setdefault(title, []).append(json.loads(out.read_text()))
    for steps in (1, 18):
        out = work / f"teacher_{steps}.json"
        fewer = ["--num_images", str(args.teacher_images)] if args.teacher_images and steps > 1 else []
        if not out.exists():
            measure(args.teacher, args, out, "--num_steps", str(steps), *fewer)
        results[f"teacher, {2 * steps - 1} evaluation{'s' * (steps > 1)}"] = [json.loads(out.read_text())]

    path = HERE / f"ablation_{args.name}.json"
    note = json.loads(path.read_text()).get("note", "") if path.exists() else ""    # written by hand
    lines, summary = table(results)
    stamp = dict(note=note, when=time.strftime("%Y-%m-%d"), summary=summary, rows=results)
    path.write_text(json.dumps(stamp, indent=1) + "\n")
    (HERE / f"ablation_{args.name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def table(results):
    """Lines of Markdown and the numbers in them, of title -> reports of its seeds: means, and spreads of a sample."""
    head = ["", "seeds", "images", "FD", "class accuracy", "precision", "recall", "minutes", "hardware", "command"]
    lines, summary = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"], {}
    for title, reports in results.items():
        row = summary[title] = {}

        def mean(name, digits, scale=1, reports=reports, row=row):
            values = [scale * (report["runs"][0] if name in report["runs"][0] else report)[name] for report in reports]
            row[name] = dict(mean=statistics.mean(values), std=statistics.stdev(values) if len(values) > 1 else None)
            spread = f" +- {row[name]['std']:.{digits}f}" if len(values) > 1 else ""
            return f"{row[name]['mean']:.{digits}f}{spread}"

        commands = [report.get("training_command", report["command"]) for report in reports]
        lines.append("| " + " | ".join([
            title, ", ".join(str(report["runs"][0]["seed"]) for report in reports), str(reports[0]["num_images"]),
            mean("fd", 2), mean("class_accuracy", 1, 100) + " %", mean("precision", 2), mean("recall", 2),
            mean("training_minutes", 1) if "training_minutes" in reports[0] else "",
            ", ".join(sorted({f"{report['threads']} cores {report['hardware']}" for report in reports})),
            "<br>".join(f"`{command}`" for command in commands),
        ]) + " |")
    return lines, summary


if __name__ == "__main__":
    main()

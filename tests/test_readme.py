"""What the documents claim can be found where they say: numbers and commands in results/, flags in the scripts."""

import importlib
import json
import re
import runpy
import shlex

import pytest
from conftest import ROOT

import train
import train0

README, DETAILS, CARD = (
    (ROOT / name).read_text() for name in ("README.md", "results/README.md", "weights/README.md"))
DOCUMENTS = f"{README}\n\n{DETAILS}\n\n{CARD}"


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
    " ".join(re.sub(r"[*_]{2}|\|[-|]+\|", " ", block).split())
    for block in re.split(r"\n\s*\n(?!\|)", re.sub(
        r"results/(\w+)\{([\w,]+)\}\.json",                                       # a_{b,c}: two files
        lambda found: " ".join(f"results/{found[1]}{name}.json" for name in found[2].split(",")), DOCUMENTS,
    ))
]
MODES = "fp32", "bf16", "compiled"
CIFAR10, GUIDED = "cifar10_jpeg", "cifar10_jpeg_guided_teacher"
DEMO, SHAPES, PHOTOS = "demo", "ablation_shapes", "ablation_cifar10_jpeg"
FD, STD, ACCURACY, MINUTES = "fd/mean", "fd/std", "class_accuracy/mean", "training_minutes/mean"


def row(name, title, shown, minutes=True):
    """A row of an ablation's table: its words in README, the file, and where the numbers are."""
    seeds, spread = (3, " ± {:.2f}") if shown in ("DM loss alone", "+ GAN") else (1, "")
    words = f"| {shown} | {seeds} | {{:.2f}}{spread} | {{:.1f}} % |" + (" {:.1f} |" if minutes else " |")
    places = [FD, *([STD] if spread else []), ACCURACY, *([MINUTES] if minutes else [])]
    return words, name, [f"summary/{title}/{place}" for place in places]


def network(title, evaluations, minutes, file, second):
    """A row of the table of all networks: minutes in CIFAR10, 5,000 images in file and, if any, in second."""
    files = [f"cifar10_jpeg_{file}", *([f"cifar10_jpeg_resnet_{second}"] if second else [])]
    three = " {:.2f} | {:.1f} % | {:.1f} % |"
    words = f"| {title} | {evaluations} | {'{:.1f} ' if minutes else ''}|{three}{three if second else ' | | |'}"
    metrics = [f"{percent}metrics/{name}@5000/mean" for percent, name in (
        ("", "fd"), ("% ", "class_accuracy"), ("% ", "recall"))]
    places = [f"{name}#{place}" for name in files for place in metrics]
    return words, CIFAR10, [*([f"{minutes}/training_minutes"] if minutes else []), *places]


ONE_GO, EARLIER, PROLONGED = (
    f"make cifar10/{run}" for run in ("in one go", "in one go, guidance 4", "18,000 steps"))
H100 = "cifar10_jpeg_h100"
NETWORKS = [network(*row) for row in (
    ("teacher of an H100, 64 channels: shipped", 35, f"{H100}#teacher", "h100_teacher", None),
    ("guided by 2", 45, None, "h100_guided_teacher", None),
    ("its student: student, shipped", 1, f"{H100}#student", "h100_student", None),
    ("another, on 2 CPU cores, not autoguided", 1, "64 channels/student on 2 CPU cores", "student_64", None),
    ("teacher of Adam, 32,000 steps", 35, "teacher", "teacher", "teacher"),
    ("guided by 4, not autoguided", 45, None, "guided_teacher_5000", "guided_teacher"),
    ("its student, 3,600 steps", 1, "student", "student", "student"),
    ("teacher of `make cifar10`, Muon, 9,000 steps", 35, f"{ONE_GO}/teacher", "make2_teacher_5000", None),
    ("guided by 3 and autoguided", 55, None, "make2_guided_teacher_5000", None),
    ("its student: `make cifar10`", 1, f"{ONE_GO}/student", "make2_student_5000", None),
    ("the same, seed 1", 1, f"{ONE_GO}/student, seed 1", "make2_student_seed_1", None),
    ("teacher of an earlier `make cifar10`, alike", 35, f"{EARLIER}/teacher", "make_teacher_5000", None),
    ("guided by 4 and autoguided", 55, None, "make_guided_teacher_guidance_4", None),
    ("guided by 3 and autoguided", 55, None, "make_guided_teacher_5000", None),
    ("its student, guidance 4", 1, f"{EARLIER}/student", "make_student_guidance_4", "make_student_guidance_4"),
    ("its student, guidance 3, as `make cifar10` today", 1, "make cifar10/guidance 3/student", "make_student_5000",
     "make_student"),
    ("the same with the GAN", 1, "make cifar10/guidance 3/student, GAN", "make_student_gan", "make_student_gan"),
    ("the prolonged teacher: the earlier one, to 18,000 steps", 35, f"{PROLONGED}/teacher", "prolonged_teacher", None),
    ("guided by 4 and autoguided", 55, None, "long_guided_teacher", None),
    ("guided by 3 and autoguided", 55, None, "prolonged_guided_teacher", "prolonged_guided_teacher"),
    ("its student, guidance 4", 1, f"{PROLONGED}/student", "long_student", "long_student"),
    ("its student, guidance 3", 1, f"{PROLONGED}/student, guidance 3", "student_seed_0", "student_seed_0"),
    ("the same, seed 1", 1, None, "student_seed_1", "student_seed_1"),
    ("with the GAN", 1, f"{PROLONGED}/student, GAN", "prolonged_student", "prolonged_student"),
    ("with three times its weight, 1e-2", 1, f"{PROLONGED}/student, GAN, weight 1e-2", "student_gan_1e_2", None),
)]

# Words of the documents with {} for each number, the file in results/ that has them, and where: a/b/c, "file#a/b/c" for
# one of another file, "% a" for a fraction in percent, "+ */a" for a sum over parts.
STATED = [
    ("teacher {:.2f}, student {:.2f}, the teacher's own single step {:.1f}", DEMO, [
        f"measured/{who}/metrics/fd@5000/mean"
        for who in ("teacher, 35 evaluations", "student, 1 evaluation", "teacher, 1 evaluation")
    ]),
    ("had FD {:.2f} for the teacher and {:.2f} for the student, where today's has {:.2f} and {:.2f}", DEMO, [
        f"{when}measured/{who}/metrics/fd@5000/mean"
        for when in ("earlier/", "") for who in ("teacher, 35 evaluations", "student, 1 evaluation")]),
    ("The demo took {:.1f} minutes", DEMO, ["minutes"]),
    ("is {:.1f} % for the teacher and {:.1f} % for the student", DEMO, [
        f"% measured/{who}/metrics/precision@5000/mean"
        for who in ("teacher, 35 evaluations", "student, 1 evaluation")
    ]),
    *[row(name, title, shown, minutes=not title.startswith("teacher")) for name, title, shown in (
        (SHAPES, "DM loss alone (the seed's)", "DM loss alone"), (SHAPES, "+ GAN", "+ GAN"),
        (SHAPES, "+ GAN, 2 steps", "+ GAN, 2 steps"), (SHAPES, "+ GAN, 4 steps", "+ GAN, 4 steps"),
        (SHAPES, "+ GAN, f_div rkl", "+ GAN at every noise, as `--f_div` needs it"),
        (SHAPES, "+ GAN, f_div kl", "the same with `--f_div kl`"),
        (SHAPES, "+ GAN, f_div js", "the same with `--f_div js`"),
        (SHAPES, "teacher, 35 evaluations", "teacher, 35 evaluations"),
        (PHOTOS, "DM loss alone (the seed's)", "DM loss alone"), (PHOTOS, "+ GAN", "+ GAN"),
        (PHOTOS, "+ GAN, 2 steps", "+ GAN, 2 steps"), (PHOTOS, "+ GAN, 4 steps", "+ GAN, 4 steps"),
        (PHOTOS, "teacher, 1 evaluation", "teacher, 1 evaluation"),
        (PHOTOS, "teacher, 35 evaluations", "teacher, 35 evaluations"),
    )],
    ("The floor: 5,000 fresh images of the dataset itself are at {:.2f}", "calibration_fresh_shapes",
     ["metrics/fd@5000/mean"]),
    *[(f"| {title} | {nfe} | {time}| {{:.2f}} | {{:.1f}} % | {{:.1f}} % | {{:.1f}} |", CIFAR10, [
        *([f"{minutes}/training_minutes"] if minutes else []), *(f"cifar10_jpeg_{file}#{place}" for place in (
            "metrics/fd@5000/mean", "% metrics/class_accuracy@5000/mean", "% metrics/recall@5000/mean",
            "checkpoint/images_per_second"))
    ]) for title, nfe, time, minutes, file in (
        ("teacher, shipped", 35, "{:.1f} min, H100 ", f"{H100}#teacher", "h100_teacher"),
        ("the same, guided", 45, "", "", "h100_guided_teacher"),
        ("student, shipped", 1, "{:.1f} min more ", f"{H100}#student", "h100_student"),
        ("teacher, of `make cifar10`", 35, "{:.1f} min, 2 cores ", "make cifar10/in one go/teacher",
         "make2_teacher_5000"),
        ("the same, guided and autoguided", 55, "", "", "make2_guided_teacher_5000"),
        ("student, of `make cifar10`", 1, "{:.1f} min more ", "make cifar10/in one go/student", "make2_student_5000"))],
    *NETWORKS,
    ("trained in {:.1f} minutes: right for {:.2f} % of the test images, which are at FD {:.2f}",
     "cifar10_jpeg_resnet_calibration_test", [
        "feature_network_minutes", "% feature_network_accuracy", "metrics/fd/mean"]),
    ("FD {:.2f}, class accuracy {:.1f} %, recall {:.1f} % and {:.2f}, {:.1f} %, {:.1f} %",
     f"{CIFAR10}_third_h100_student", [
        f"{CIFAR10}_third_{who}_student#{percent}metrics/{name}@5000/mean" for who in ("h100", "prolonged")
        for percent, name in (("", "fd"), ("% ", "class_accuracy"), ("% ", "recall"))]),
    ("trained in {:.1f} minutes on one H100", H100, ["+ */training_minutes"]),
    ("of one seed came to {:.2f} and {:.2f}", "cifar10_jpeg_make_student_5000", [
        f"cifar10_jpeg_{run}_student_5000#metrics/fd@5000/mean" for run in ("make", "make2")]),
    ("stopped at {:,} of the teacher's {:,} steps", H100, ["teacher/steps", "teacher/planned_steps"]),
    ("{:,} steps of 512 images with Muon of the preset's {:,}, where the clock stopped it, {:.1f} minutes", H100, [
        "teacher/steps", "teacher/planned_steps", "teacher/training_minutes"]),
    ("{:,} steps of 512 images with Muon, {:.1f} minutes", H100, ["student/steps", "student/training_minutes"]),
    ("18,000 steps of 64 images with Muon, {:.1f} minutes", CIFAR10, [f"{PROLONGED}/teacher/training_minutes"]),
    *[(f"| {title} | {{:,.0f}} | {{:,}} |", H100, [f"{run}/median_images_per_second", f"{run}/peak_memory_mib"])
      for title, run in (
          ("teacher, Muon's products launched one by one", "before_replaying"),
          ("teacher, Muon's products replayed, as today", "teacher"), ("student", "student"))],
    ("launches {:,} kernels that run for {:.1f} of its {:.1f} milliseconds", H100, [
        f"before_replaying/profile/{name}" for name in ("kernel_launches", "kernels_ms", "all_ms")]),
    ("{:.2f} times as many images a second, by the medians", H100, ["replaying_images_per_second_ratio"]),
    ("whose last reading was {:,}", H100, ["before_replaying/last_images_per_second"]),
    ("gained nothing: {:.1f} and {:.1f} milliseconds", H100, [
        f"before_replaying/profile/cudnn_{name}_ms" for name in ("not_deterministic", "benchmark")]),
    ("was to take {:,} steps, and `--max_minutes` stopped it at {:,}", H100, [
        "teacher/planned_steps", "teacher/steps"]),
    *[(f"| {title} | {nfe} | {{:.2f}} | {{:.1f}} % | {{:.1f}} % | {{:.1f}} % |", f"{H100}_{file}", [
        f"{percent}metrics/{name}@5000/mean" for percent, name in (
            ("", "fd"), ("% ", "class_accuracy"), ("% ", "precision"), ("% ", "recall"))])
      for title, nfe, file in (
          ("teacher", 35, "teacher"), ("teacher, guided", 45, "guided_teacher"), ("student", 1, "student"))],
    ("10,000 real test images are at {:.2f}, and the classifier recognises {:.2f} % of them", "calibration_test", [
        "metrics/fd/mean", "% feature_network_accuracy"]),
    ("took {:.1f} minutes from nothing, with installing and measuring", CIFAR10, ["make cifar10/in one go/minutes"]),
    ("by 10,000 images, its teacher is at FD {:.2f}, class accuracy {:.1f} %, recall {:.1f} %, its student at "
     "FD {:.2f}, {:.1f} %, {:.1f} %", "cifar10_jpeg_make2_teacher", [
        f"cifar10_jpeg_make2_{who}#{percent}metrics/{name}/mean"
        for who in ("teacher", "student")
        for percent, name in (("", "fd"), ("% ", "class_accuracy"), ("% ", "recall"))]),
    ("those of the earlier run at {:.2f} and {:.2f}", "cifar10_jpeg_make_teacher", [
        f"cifar10_jpeg_make_{who}#metrics/fd/mean" for who in ("teacher", "student")]),
    ("teachers at {:.2f} and {:.2f}, guided and autoguided {:.2f} and {:.2f}, and students at {:.2f} and {:.2f}",
     CIFAR10, [f"cifar10_jpeg_{run}_{who}_5000#metrics/fd@5000/mean"
               for who in ("teacher", "guided_teacher", "student") for run in ("make", "make2")]),
    *[("both CPUs, are at {:.2f} and {:.2f} on either", f"cifar10_jpeg_prolonged_student{cpu}", [
        f"cifar10_jpeg_prolonged_{who}{cpu}#metrics/fd@5000/mean" for who in ("teacher", "student")])
      for cpu in ("", "_xeon")],
    ("seed 0 ended at FD {:.2f} and seed 1 at {:.2f}", CIFAR10, [
        f"tried/2,400 steps{seed}/curve/-1/fd@2048" for seed in ("", ", seed 1")]),
    *[(f"| {title} | {minutes and '{:.1f} '}| {{:.2f}} | {{:.2f}} | {{:.2f}} | {{:.2f}} |", CIFAR10, [
        *([f"{run}/training_minutes"] if minutes else []), *(f"{run}/curve/{i}/fd@2048" for i in range(4))])
      for title, run, minutes in (
          ("the teacher of the earlier `make cifar10`", "make cifar10/guidance 3/student", True),
          ("the prolonged teacher", "make cifar10/18,000 steps/student, guidance 3", True),
          ("the same, seed 1", "make cifar10/18,000 steps/student, guidance 3, seed 1", ""),
          ("the same, GAN", "make cifar10/18,000 steps/student, GAN", True))],
    *[("| Adam | {:,} | {:.1f} | {:.2f} | {:.1f} % |", CIFAR10, [
        *(f"teacher/curve/{i}/{place}" for place in ("steps", "minutes", "fd")), f"% teacher/curve/{i}/class_accuracy"])
      for i in range(4)],
    *[(f"| Muon, {title} | {{:,}} | {{:.1f}} | {{:.2f}} | {{:.1f}} % |", CIFAR10, [
        *(f"make cifar10/{run}/teacher/{place}" for place in ("steps", "training_minutes")), *(
            f"cifar10_jpeg_{file}#{percent}metrics/{name}@5000/mean"
            for percent, name in (("", "fd"), ("% ", "class_accuracy")))])
      for title, run, file in (
          ("the earlier `make cifar10`", "in one go, guidance 4", "make_teacher_5000"),
          ("prolonged", "18,000 steps", "prolonged_teacher"))],
    ("a held-out loss of {:.4f} after 9,000 steps, and Adam's of {:.4f} after 32,000; 9,000 steps more bring it "
     "down to {:.4f}", "heldout_loss", ["rows/1/mean", "rows/0/mean", "rows/2/mean"]),
    ("whose distances are smaller, is at {:.4f}", "heldout_loss_make2", ["rows/0/mean"]),
    *[(f"| `--cfg_scale {scale}` | {{:.2f}} | {{:.1f}} % | {{:.1f}} % |", CIFAR10, [
        f"guidance/{scale}/curve/-1/fd@2048", *(
            f"% guidance/{scale}/curve/-1/{name}@2048" for name in ("class_accuracy", "recall"))])
      for scale in ("1.5", "2", "3")],
    *[(f"| {shown} | {{:.2f}} | {{:.1f}} % | {{:.1f}} % |", CIFAR10, [
        f"guidance/4, 0.15 to 5{noise}/curve/-1/fd@2048", *(
            f"% guidance/4, 0.15 to 5{noise}/curve/-1/{name}@2048" for name in ("class_accuracy", "recall"))])
      for noise, shown in (
          ("", "`--cfg_scale 4 --cfg_interval 0.15 5`"),
          ("; DM noise 0.15 to 0.75", "the same, `--min_step_percent 0.15 --max_step_percent 0.75`"),
          ("; DM noise 0.25 to 0.65", "the same, `--min_step_percent 0.25 --max_step_percent 0.65`"),
          ("; DM noise 0.1 to 0.65", "the same, `--min_step_percent 0.1 --max_step_percent 0.65`"),
          ("; DM noise 0.1 to 0.65, fake_unet too", "the same and `--fake_noise dm`"),
          ("; DM noise 0.1 to 0.65, fake_unet too; muon", "the same and `--optimizer muon`"))],
    *[(f"| {title} | {{}} | {{:.2f}} | {{:.1f}} % | {{:.1f}} % |", GUIDED, [
        f"cifar10_jpeg_{file}_teacher#{place}" for place in (
            "checkpoint/evaluations", "metrics/fd@2048/mean", "% metrics/class_accuracy@2048/mean",
            "% metrics/recall@2048/mean")])
      for title, file in (
          ("teacher, Adam, guided", "guided"), ("and autoguided", "autoguided"),
          ("teacher, of `make cifar10`, guided", "muon_guided"), ("and autoguided", "muon_autoguided"))],
    *[(f"| {title} | {{}} | {{:.2f}} | {{:.1f}} % | {{:.1f}} % |", f"cifar10_jpeg_long_guide_{guide}", [
        "checkpoint/evaluations", "metrics/fd@2048/mean", "% metrics/class_accuracy@2048/mean",
        "% metrics/recall@2048/mean"])
      for title, guide in (
          ("prolonged to 18,000 steps, the guide still of step 3,000", "3000"),
          ("the same, guided by its state of step 9,000", "9000"))],
    ("| 32 channels | | {:.4f} | {:.4f} | {:.4f} |", "heldout_loss_widths", [f"rows/{i}/mean" for i in range(3)]),
    ("| 64 channels | {:.4f} | {:.4f} | {:.4f} | {:.4f} |", "heldout_loss_widths", [
        f"rows/{i}/mean" for i in range(3, 7)]),
    ("180 steps of 512 images in {:.1f} minutes, to a held-out loss of {:.4f}", "heldout_loss_gpu_preset", [
        "cifar10_jpeg#cifar10_gpu on a CPU/teacher/training_minutes", "rows/0/mean"]),
    ("FD {:.2f} after 600 steps and {:.2f} after 1,200, where it was stopped, instead of {:.2f} and {:.2f}", CIFAR10, [
        f"{run}/curve/{i}/fd@2048"
        for run in ("autoguidance/make cifar10, guide of step 1,350", "make cifar10/student") for i in (0, 1)]),
    *[(f"| {who} | {{}} | {{}} |", "published", [f"rows/{i}/evaluations", f"rows/{i}/fid"]) for i, who in enumerate(
        ("EDM, the usual teacher", "DMD2, NVIDIA FastGen", "f-distill, forward KL", "SiD", "SiD2A"))],
    *[(f"| {title} | {{:.0f}} | {{:.0f}} | {{:.0f}} | {{:,}} |", "benchmark", [
        *(f"modes/{mode}/{part}/ms" for mode in MODES), f"modes/bf16/{part}/peak_memory_mib"])
      for title, part in (
          ("teacher step", "teacher_step"), ("generator turn", "generator_turn"), ("guidance turn", "guidance_turn"),
          ("one-step sampling", "sample_one_step"), ("Heun sampling, 35 evaluations", "sample_heun"))],
    ("One-step sampling makes {:.1f}, {:.1f} and {:.1f} times as many", "benchmark", [
        f"ratios/{mode}/one_step_to_heun_images" for mode in MODES]),
    ("A guidance turn takes {:.2f}, {:.2f} and {:.2f} times its floor", "benchmark", [
        f"ratios/{mode}/guidance_turn_to_floor" for mode in MODES]),
    ("a line of log, {:.2f} % of it in bf16", "benchmark", ["% ratios/bf16/loop_to_guidance_turn"]),
    ("of a teacher step in bf16 {:.0f} % are the backward of convolutions and {:.0f} % their forward, and the whole "
     "runs at {:.0f} % of the speed", "benchmark", [
        *(f"% operators/bf16/teacher_step/aten::{name}" for name in ("convolution_backward", "mkldnn_convolution")),
        "% modes/bf16/teacher_step/fraction_of_matmul"]),
    ("asked for ({:.2f} % of real test images)", "calibration_test", ["% feature_network_accuracy"]),
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
    ("In an hour of `train.py` (8 channels, one thread), {:,} steps, the memory of the last ten minutes was {:.3f} "
     "times that of the first, the speed {:.2f} times", "stress_hour",
     ["steps", "memory_ratio", "speed_ratio_per_cpu_second"]),
    ("And {} flags were given", "stress_flags", ["flags"]),
    ("{:,} times in all", "stress_flags", ["values_run"]),
]
# Numbers that are settings or properties of the data, and so measured nowhere.
SETTINGS = """
    the 50,000 training images of CIFAR-10; own average at step 4,000; PyTorch 2.11;
    the noise levels 0.15 and 5, and 2 away; very files, 5,000 images; channels, ten classes, 21.00 M; channels, 5.26 M;
    it measures 10,000 images; needs 2,048 or more; in its last 20,000 steps; recall of 50,000 images;
    H100's student: FD of 5,000 images; students: of 2,048, a; 5,000 images to the 50,000 training images;
    5,000 images of each against; FD of 2,048 images; Teachers, 5,000 images; 5,000 images, FD in; by 10,000 images;
    KID, precision and recall of 10,000 real images; 5,000 images, mean and standard deviation; of 2,048 images;
    one seed each, 2,048 images; recall by 10,000 real images; whose evaluations are 35 times as many; after 1,200
    steps; Heun's method, 2,048 images; 2,048 images); minutes for all 2,400; | 600 | 1,200 | 1,800 | 2,400 |;
    teacher of Adam, 32,000 steps; of 5,600 steps of Adam; own state at 5,600 steps; had one cosine to 9,000 steps;
    9,000 steps came to the loss of 32,000 of Adam; and 18,000 to a nearer; not as good yet after 9,000 steps; after
    18,000 steps, in half; noise levels 0.15 and 5; noise of 0.15 and 5; with the state at 0.15 of the run; its step
    3,000, did
"""


def preset_row(name):
    """A preset as README's table has it: channels, and steps of how many images for teacher and student."""
    flags = ["--preset", name] if name else []
    teacher, student = (vars(script.parse_args(flags)[0]) for script in (train0, train))
    return f"{teacher['channels']} | " + " | ".join(f"{x['steps']:,} of {x['batch_size']}" for x in (teacher, student))


def report(name):
    return json.loads((ROOT / f"results/{name}.json").read_text())


def at(name, place):
    """The number that is meant by a place, see STATED."""
    name, place = place.split("#") if "#" in place else (name, place)
    if place.startswith("+ */"):
        return sum(part.get(place[4:], 0) for part in report(name).values() if isinstance(part, dict))
    percent, value = place.startswith("% "), report(name)
    for key in place.removeprefix("% ").split("/"):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return 100 * value if percent else value


def stated(words, name, places):
    """The words as results/ would have them."""
    return words.format(*(at(name, place) for place in places))


@pytest.mark.parametrize(
    ("words", "name", "places"), STATED, ids=[f"{name}: {words[:30]}" for words, name, _ in STATED]
)
def test_the_numbers_stand_in_the_file_named(words, name, places):
    text = stated(words, name, places)
    names = {name, *(place.split("#")[0].removeprefix("% ") for place in places if "#" in place)}
    near = [block for block in BLOCKS if all(f"results/{name}.json" in block for name in names)]
    assert any(text in block for block in near), f"{names} say: {text}"
    assert all(commands(report(name)) for name in names)


def test_no_other_numbers_are_claimed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)                     # where there are no runs
    sources = r"\[[^\]]*\]\([^)]*\)|`[^`]*`|>= [\d.]+|(sections?|equations?) [\d.]+((, | and )[\d.]+)*"
    rest = re.sub(sources, "", " ".join(BLOCKS))
    for words, name, places in STATED:
        rest = rest.replace(re.sub(r"`[^`]*`", "", stated(words, name, places)), "")
    for name in (None, *train.PRESETS):
        rest = rest.replace(preset_row(name), "")
    for words in SETTINGS.split(";"):
        rest = rest.replace(" ".join(words.split()), "")
    assert re.findall(r".{30}(?<![\w.])\d+(?:\.\d+|,\d{3}| %).{10}", rest) == []


def test_the_curve_is_drawn_from_the_results():
    drawn = runpy.run_path(str(ROOT / "results/cifar10_curve.py"))["figure"]()
    assert drawn == (ROOT / "results/cifar10_curve.svg").read_text()
    record = report(CIFAR10)
    students = record["student"], record["make cifar10"]["18,000 steps"]["student, GAN"]
    distances = [point["fd@2048"] for student in students for point in student["curve"]]
    assert all(f": {distance:.2f}</title>" in drawn for distance in distances)


def test_the_table_of_presets_is_that_of_the_scripts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)                     # where there are no runs
    assert set(train.PRESETS) == set(train0.PRESETS)
    for name in (None, *train.PRESETS):
        shown = f"`{name}`" if name else "none"
        assert re.search(rf"^\| {shown} \| .* \| {re.escape(preset_row(name))} \|", README, re.MULTILINE), name


@pytest.mark.parametrize(("script", "name"), [(train0, "teacher"), (train, "student")])
def test_the_preset_of_a_gpu_is_what_was_run_there(script, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(report(H100)[name]["command"])
    assert words[:2] == ["python", f"{script.__name__}.py"]
    run, preset = (vars(script.parse_args(flags)[0]) for flags in (words[2:], ["--preset", "cifar10_gpu"]))
    places = {"dataset", "data_dir", "run_dir", "teacher", "max_minutes", "log_every", "sample_every", "save_every"}
    assert {flag for flag in run if run[flag] != preset[flag]} <= places


def test_every_flag_in_the_readme_exists():
    scripts = "".join(path.read_text() for path in ROOT.glob("*.py"))
    known = set(re.findall(r'"(--\w+)"', scripts)) | {"--logdir", "--help", "--nproc_per_node"}
    assert set(re.findall(r"(?<![\w-])--\w+", DOCUMENTS)) <= known


def test_commands_stand_in_blocks_of_code():
    assert re.findall(r"^(?:python|pip|torchrun) .*", README, re.MULTILINE) == []   # unindented, they run into a line
    assert len(re.findall(r"^    python train0?\.py", README, re.MULTILINE)) == 4


@pytest.mark.parametrize("target", ["demo", "cifar10"])
def test_make_calls_the_scripts_as_they_are(target, monkeypatch, tmp_path):
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    lines = re.findall(r"\$\(RUN\) (\w+)\.py (.*)", recipe)
    assert len(lines) == (4 if target == "demo" else 6)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / target).mkdir(parents=True)
    made = dict(PRESET=target, DATA="--dataset cifar10", EVALUATE="")
    for script, flags in lines:
        flags = re.sub(r"\$\((\w+)\)", lambda found: made[found[1]], flags)
        importlib.import_module(script).parse_args(flags.split())                   # raises where a flag is not one


def test_commands_in_the_results_name_no_place_of_one_machine():
    reports = [json.loads(path.read_text()) for path in (ROOT / "results").glob("*.json")]
    found = [command for report in reports for command in commands(report)]
    assert len(found) > 50 and [command for command in found if re.search(r"[\s='\"][/~]", command)] == []


def test_every_file_in_the_readme_exists():
    for name in re.findall(r"`([\w/]+\.(?:py|json|png|md))`", DOCUMENTS) + re.findall(r"\]\((results/[^)#]+)", README):
        if not name.startswith("runs/") and name not in ("results/evaluation.json", "grid.png"):
            assert (ROOT / name).is_file(), name

"""Draws results/cifar10_curve.svg, the distance against training time, from results/cifar10_jpeg.json and _h100.json.

    python results/cifar10_curve.py

The student's time counts from where its teacher's ends, as it needs the whole of it.
"""

import json
import math
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEFT, RIGHT, TOP, BOTTOM = 60, 700, 20, 300         # the axes, in pixels
PALE, STRONG, GPU = ("#8ab", "#d99"), ("#1f77b4", "#d62728"), "#2a7d2a"
MINUTES, DISTANCES = 400, (2.5, 80)                  # the ranges that they span, the distance in logarithms


def x(minutes):
    return LEFT + (RIGHT - LEFT) * minutes / MINUTES


def y(distance):
    low, high = map(math.log, DISTANCES)
    return BOTTOM - (BOTTOM - TOP) * (math.log(distance) - low) / (high - low)


def text(left, top, words, anchor="start", colour="#333"):
    return f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def line(points, style):
    path = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
    return f'<polyline points="{path}" fill="none" {style}/>'


def curve(points, colour):
    """A line through (minutes, distance), with a dot and its value, to be read with the mouse, at each."""
    places = [(x(minutes), y(distance)) for minutes, distance in points]
    dots = [
        f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" fill="{colour}"><title>{minutes:.1f} min: {distance:.2f}</title>'
        "</circle>"
        for (left, top), (minutes, distance) in zip(places, points, strict=True)
    ]
    return [line(places, f'stroke="{colour}" stroke-width="2"'), *dots]


def runs(teacher, student, colours, words):
    """A teacher's curve and, from where it ends, its student's; the words to the right of each."""
    teacher = [(point["minutes"], point.get("fd@2048", point.get("fd"))) for point in teacher["curve"]]
    start = teacher[-1][0]
    student = [(start + point["minutes"], point["fd@2048"]) for point in student["curve"]]
    parts = []
    for points, colour, label in zip((teacher, student), colours, words, strict=True):
        end, distance = points[-1]
        parts += [*curve(points, colour), text(x(end) + 6, y(distance) + 19, label, colour=colour)]
    return parts


def measured(name):
    """The minutes and the distance of a network of the H100 alone, whose curve was not measured."""
    run = json.loads((HERE / "cifar10_jpeg_h100.json").read_text())[name]
    return run["training_minutes"], json.loads((HERE / run["measured_in"]).read_text())["metrics"]["fd@5000"]["mean"]


def figure():
    record = json.loads((HERE / "cifar10_jpeg.json").read_text())
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 350" font-family="sans-serif" font-size="13">',
        '<rect width="720" height="350" fill="white"/>',
    ]
    for distance in (3, 5, 10, 20, 50):
        parts.append(line([(LEFT, y(distance)), (RIGHT, y(distance))], 'stroke="#ddd"'))
        parts.append(text(LEFT - 8, y(distance) + 4, distance, "end"))
    for minutes in range(0, MINUTES + 1, 40):
        parts.append(text(x(minutes), BOTTOM + 18, minutes, "middle"))
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 40, "minutes of training, on 2 CPU cores or an H100", "middle"))
    parts.append(text(LEFT + 8, TOP - 6, "Fréchet distance"))
    muon = record["make cifar10"]["18,000 steps"]
    parts += runs(record["teacher"], record["student"], PALE, ("teacher, Adam", "student, Adam"))
    parts += runs(muon["teacher"], muon["student, GAN"], STRONG, ("teacher, Muon", "student, Muon, GAN"))
    start = 0
    for name in ("teacher", "student"):
        minutes, distance = measured(name)
        start += minutes                            # a student's time counts from its teacher's end
        parts += curve([(start, distance)], GPU)
        parts.append(text(x(start) + 8, y(distance) + 4, f"{name}, H100, shipped", colour=GPU))
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    (HERE / "cifar10_curve.svg").write_text(figure())

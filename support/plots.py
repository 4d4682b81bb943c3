"""Plots drawn with Pillow: points, arrows and a density on a plane, a curve, bars; and animations of them.

    canvas = Canvas(480, 640)
    plane = canvas.axes((10, 10, 470, 470), (-1, 1), (-1, 1))
    plane.points([(0.1, 0.2)])
    canvas.image().save("plot.png")
"""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

SCALE = 2                                           # supersampling: drawn at twice the size, then reduced
INK, GREY, DATA, STUDENT, ARROW = (40, 40, 40), (190, 190, 190), (60, 120, 200), (220, 90, 40), (20, 110, 60)


class Canvas:
    """A white picture; all coordinates are pixels of the finished one."""

    def __init__(self, width, height):
        self.size = width, height
        self.picture = Image.new("RGB", (SCALE * width, SCALE * height), "white")
        self.pen = ImageDraw.Draw(self.picture, "RGBA")

    def image(self):
        return self.picture.resize(self.size, Image.Resampling.LANCZOS)

    def text(self, place, words, size=13, colour=INK):
        self.pen.text([SCALE * v for v in place], words, fill=colour, font=ImageFont.load_default(SCALE * size))

    def line(self, places, colour=INK, width=1.0):
        self.pen.line([SCALE * v for place in places for v in place], fill=colour, width=round(SCALE * width))

    def box(self, corners, outline=None, fill=None):
        self.pen.rectangle([SCALE * v for v in corners], outline=outline, fill=fill, width=SCALE)

    def axes(self, corners, x_range, y_range):
        """A frame with coordinates of its own."""
        self.box(corners, outline=GREY)
        return Axes(self, corners, x_range, y_range)

    def curve(self, corners, title, x, y, x_end, log=False):
        """A line through the points (x, y) so far; x goes from 0 to x_end."""
        left, top, right, bottom = corners
        self.text((left, top - 14), title, size=10)
        value = [math.log10(max(v, 1e-4)) for v in y] if log else y
        low, high = (math.floor(min(value)), math.ceil(max(value))) if log else (0, max(value))
        axes = self.axes(corners, (0, x_end), (low, max(high, low + 1)))
        for tick in range(low, high + 1) if log else ():
            place = axes.place(0, tick)
            self.line([place, (right, place[1])], GREY, 0.5)
            self.text((left + 3, place[1] + (1 if tick == high else -11)), f"{10.0**tick:g}", size=9)
        self.line([axes.place(*point) for point in zip(x, value, strict=True)], STUDENT, 1.5)
        self.text((right - 52, bottom - 12), f"{x_end:,} steps", size=9)

    def bars(self, corners, title, values, wanted):
        """A bar for each value, with a line at the value that is wanted."""
        self.text((corners[0], corners[1] - 14), title, size=10)
        axes = self.axes(corners, (0, len(values)), (0, 1.25 * max(*values, *wanted)))
        for i, (value, goal) in enumerate(zip(values, wanted, strict=True)):
            (x0, y0), (x1, y1) = axes.place(i + 0.15, value), axes.place(i + 0.85, 0)
            self.box((x0, y0, x1, y1), fill=STUDENT)
            self.line([axes.place(i + 0.05, goal), axes.place(i + 0.95, goal)], DATA, 1.5)


class Axes:
    """A part of a canvas in which (x, y) are coordinates, y upwards."""

    def __init__(self, canvas, corners, x_range, y_range):
        self.canvas, self.corners, self.ranges = canvas, corners, (x_range, y_range)

    def place(self, x, y):
        """Pixels of a point."""
        (x0, x1), (y0, y1) = self.ranges
        left, top, right, bottom = self.corners
        return left + (right - left) * (x - x0) / (x1 - x0), bottom - (bottom - top) * (y - y0) / (y1 - y0)

    def density(self, density, cells=160):
        """Shades of blue by the square root of density([N, 2]) -> [N], so that weak modes show too."""
        (x0, x1), (y0, y1) = self.ranges
        x, y = (torch.linspace(a, b, cells) for a, b in ((x0, x1), (y1, y0)))
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        value = density(torch.stack([columns.flatten(), rows.flatten()], 1)).sqrt()
        value = (value / value.max()).reshape(cells, cells, 1).numpy()
        shades = 255 + value * (np.array([120, 170, 235]) - 255)
        left, top, right, bottom = (SCALE * v for v in self.corners)
        picture = Image.fromarray(shades.astype(np.uint8))
        picture = picture.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        self.canvas.picture.paste(picture, (left, top))
        self.canvas.box(self.corners, outline=GREY)

    def points(self, points, colour=STUDENT, radius=1.3):
        for point in points:
            if self.inside(point):
                x, y = (SCALE * v for v in self.place(*point))
                r = SCALE * radius
                self.canvas.pen.ellipse([x - r, y - r, x + r, y + r], fill=(*colour, 150))

    def arrows(self, points, moves, colour=ARROW, longest=0.35):
        """An arrow from each point along its move, in coordinates; none is longer than `longest`."""
        for point, move in zip(points, moves, strict=True):
            length = math.hypot(*move)
            if length < 1e-3 or not self.inside(point):
                continue
            factor = min(1.0, longest / length)
            tip = point[0] + factor * move[0], point[1] + factor * move[1]
            (x0, y0), (x1, y1) = self.place(*point), self.place(*tip)
            self.canvas.line([(x0, y0), (x1, y1)], colour, 1.0)
            angle, head = math.atan2(y1 - y0, x1 - x0), min(5.0, 0.5 * math.hypot(x1 - x0, y1 - y0))
            for turn in (2.6, -2.6):
                barb = x1 + head * math.cos(angle + turn), y1 + head * math.sin(angle + turn)
                self.canvas.line([(x1, y1), barb], colour)

    def inside(self, point):
        return all(low <= v <= high for v, (low, high) in zip(point, self.ranges, strict=True))


def side_by_side(pictures):
    """Pictures of one height in a row."""
    row = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height), "white")
    for i, picture in enumerate(pictures):
        row.paste(picture, (sum(earlier.width for earlier in pictures[:i]), 0))
    return row


def save_gif(frames, file, milliseconds=90, colours=32):
    """Write pictures as an endless animation of few colours; the last one stays for two seconds."""
    palette = frames[-1].quantize(colours, dither=Image.Dither.NONE)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    times = [milliseconds] * len(others) + [2000]
    first.save(file, format="gif", save_all=True, append_images=others, duration=times, loop=0, optimize=True)

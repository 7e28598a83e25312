"""Phantoms: stylised radiology drawn with numpy, 84 x 84 pixels of grey, a pure function of a seed.

Seven body parts in three renderings. CT and MRI are slices: each tissue is painted over what lies
beneath it, with the grey of the modality (bone is white in CT and black in MRI, fluid dark in CT
and bright in MRI). A radiograph is a projection: tissues add up along the beam, so bones shine
through. A finding lies on the left or the right half of the image. Coordinates: x to the right and
y downwards, both from -1 to 1 over the frame.
"""

from dataclasses import dataclass

import numpy as np

SIZE = 84
MODALITIES = ("MRI", "CT", "radiograph")
ANATOMIES = ("brain", "knee", "spine", "abdomen", "chest", "pelvis", "hand")
FINDINGS = ("normal", "mass", "fracture", "effusion", "calcification")
SIDES = ("left", "right")
ATTRIBUTES = {"modality": MODALITIES, "anatomy": ANATOMIES, "finding": FINDINGS, "side": SIDES}

# Grey of each tissue; for radiographs, how much it adds to the shadow.
GREYS = {
    "MRI": dict(
        fat=0.78, muscle=0.30, soft=0.45, bone=0.06, marrow=0.66, fluid=0.92, lung=0.04, pale=0.60
    ),
    "CT": dict(
        fat=0.24, muscle=0.44, soft=0.50, bone=0.96, marrow=0.74, fluid=0.36, lung=0.08, pale=0.58
    ),
    "radiograph": dict(
        fat=0.16, muscle=0.10, soft=0.12, bone=0.34, marrow=0.06, fluid=0.05, lung=-0.20, pale=0.06
    ),
}
Shape = tuple[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """What a phantom shows; `side` is None exactly when the finding is "normal"."""

    modality: str
    anatomy: str
    finding: str
    side: str | None

    def value(self, attribute: str) -> str | None:
        return getattr(self, attribute)


def sample_case(rng: np.random.Generator, modality: str | None = None) -> Case:
    """A case with every attribute uniform and independent (the modality may be given)."""
    modality = modality or str(rng.choice(MODALITIES))
    finding = str(rng.choice(FINDINGS))
    side = None if finding == "normal" else str(rng.choice(SIDES))
    return Case(modality, str(rng.choice(ANATOMIES)), finding, side)


def draw(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Draw a case: uint8 [84, 84]. Pose, proportions, texture and noise come from `rng`."""
    grid = np.linspace(-1, 1, SIZE, dtype=np.float32)
    frame_x, frame_y = np.meshgrid(grid, grid)
    angle, scale = rng.uniform(-0.15, 0.15), rng.uniform(0.92, 1.08)
    shift_x, shift_y = rng.uniform(-0.06, 0.06, 2)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    x, y = frame_x - shift_x, frame_y - shift_y
    x, y = cos * x + sin * y, -sin * x + cos * y
    shapes = _BODIES[case.anatomy](x, y, rng)
    image = _render(case.modality, shapes, frame_x, frame_y, rng)
    if case.finding != "normal":
        sign = -1 if case.side == "left" else 1
        at_x, at_y = sign * rng.uniform(0.32, 0.5), rng.uniform(-0.3, 0.3)
        image = _FINDINGS[case.finding](image, x - at_x, y - at_y, case.modality, rng)
    image = image * rng.uniform(0.9, 1.1) + rng.uniform(-0.03, 0.03)
    image = image + rng.normal(0, 0.025, image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def ellipse(
    x: np.ndarray, y: np.ndarray, cx: float, cy: float, rx: float, ry: float, tilt: float = 0
) -> np.ndarray:
    """A filled ellipse with an edge about one pixel soft: [84, 84] in 0..1."""
    dx, dy = x - cx, y - cy
    if tilt:
        dx, dy = np.cos(tilt) * dx + np.sin(tilt) * dy, -np.sin(tilt) * dx + np.cos(tilt) * dy
    distance = np.sqrt((dx / rx) ** 2 + (dy / ry) ** 2)
    return np.clip((1 - distance) * min(rx, ry) * SIZE / 2 + 0.5, 0, 1)


def box(
    x: np.ndarray, y: np.ndarray, cx: float, cy: float, rx: float, ry: float, tilt: float = 0
) -> np.ndarray:
    """A filled box with an edge about one pixel soft: [84, 84] in 0..1."""
    dx, dy = x - cx, y - cy
    if tilt:
        dx, dy = np.cos(tilt) * dx + np.sin(tilt) * dy, -np.sin(tilt) * dx + np.cos(tilt) * dy
    inside = np.minimum(rx - np.abs(dx), ry - np.abs(dy))
    return np.clip(inside * SIZE / 2 + 0.5, 0, 1)


def _render(
    modality: str,
    shapes: list[Shape],
    frame_x: np.ndarray,
    frame_y: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    greys = GREYS[modality]
    image = np.zeros((SIZE, SIZE), np.float32)
    for tissue, mask in shapes:
        image = image + mask * (
            greys[tissue] if modality == "radiograph" else greys[tissue] - image
        )
    if modality == "MRI":  # the receive coil sees one side better than the other
        slope = rng.uniform(-0.12, 0.12, 2)
        image = image * (1 + slope[0] * frame_x + slope[1] * frame_y)
    elif (
        modality == "CT"
    ):  # the table lies under the patient; beyond the field of view there is nothing
        table = np.clip(1 - np.abs(frame_y + 0.15 * frame_x**2 - 0.93) * SIZE / 3, 0, 1)
        image = np.maximum(image, 0.5 * table) * ellipse(frame_x, frame_y, 0, 0, 1.04, 1.04)
        image = image + rng.normal(0, 0.03, image.shape)
    else:  # scattered light fogs the film
        image = 0.14 + 0.08 * frame_y * rng.uniform(-1, 1) + image
    return image.astype(np.float32)


def _brain(x, y, rng) -> list[Shape]:
    ry = rng.uniform(0.8, 0.88)
    gap, tilt = rng.uniform(0.09, 0.13), rng.uniform(0.1, 0.3)
    return [
        ("fat", ellipse(x, y, 0, 0, 0.72, ry)),
        ("bone", ellipse(x, y, 0, 0, 0.66, ry - 0.06)),
        ("soft", ellipse(x, y, 0, 0, 0.57, ry - 0.15)),
        ("pale", ellipse(x, y, 0, 0, 0.42, ry - 0.32)),
        ("fluid", ellipse(x, y, -gap, -0.08, 0.06, 0.24, tilt)),
        ("fluid", ellipse(x, y, gap, -0.08, 0.06, 0.24, -tilt)),
        ("fluid", box(x, y, 0, -0.6, 0.015, 0.12)),
    ]


def _knee(x, y, rng) -> list[Shape]:
    gap, width = rng.uniform(0.05, 0.09), rng.uniform(0.24, 0.3)
    shapes = [("fat", box(x, y, 0, 0, 0.68, 1.2)), ("muscle", box(x, y, 0, 0, 0.58, 1.2))]
    for tissue, rim in (("bone", 0.0), ("marrow", 0.06)):
        shapes += [
            (tissue, box(x, y, 0, -0.72, width - rim, 0.52)),
            (tissue, ellipse(x, y, -0.2, -0.22 - gap, 0.29 - rim, 0.24 - rim)),
            (tissue, ellipse(x, y, 0.2, -0.22 - gap, 0.29 - rim, 0.24 - rim)),
            (tissue, box(x, y, 0, 0.14 + gap, 0.47 - rim, 0.14 - rim)),
            (tissue, box(x, y, 0, 0.72, width - 0.04 - rim, 0.5)),
        ]
    return shapes + [("fluid", box(x, y, 0, -0.03, 0.46, gap * 0.5))]


def _spine(x, y, rng) -> list[Shape]:
    half, pitch = rng.uniform(0.17, 0.22), rng.uniform(0.34, 0.4)
    bend = 0.08 * rng.uniform(-1, 1) * np.sin(2 * y)
    column = x - bend
    shapes = [
        ("fat", box(x, y, 0, 0, 0.8, 1.2)),
        ("muscle", box(x, y, 0, 0, 0.7, 1.2)),
        ("fluid", box(column, y, half + 0.12, 0, 0.05, 1.2)),
    ]
    for level in range(-3, 4):
        shapes += [
            ("bone", box(column, y, 0, level * pitch, half, pitch * 0.38)),
            ("marrow", box(column, y, 0, level * pitch, half - 0.05, pitch * 0.38 - 0.05)),
            ("bone", box(column, y, half + 0.3, level * pitch, 0.1, 0.04, 0.5)),
        ]
    return shapes


def _abdomen(x, y, rng) -> list[Shape]:
    kidney = rng.uniform(0.1, 0.2)
    return [
        ("fat", ellipse(x, y, 0, 0, 0.94, 0.72)),
        ("muscle", ellipse(x, y, 0, 0, 0.84, 0.62)),
        ("fat", ellipse(x, y, 0.02, 0.02, 0.78, 0.55)),
        ("pale", ellipse(x, y, -0.42, -0.12, 0.36, 0.34, 0.4)),
        ("soft", ellipse(x, y, 0.5, -0.1, 0.2, 0.28, -0.5)),
        ("soft", ellipse(x, y, 0.15, -0.28, 0.2, 0.12)),
        ("soft", ellipse(x, y, -0.36, 0.28 + kidney / 4, 0.12, 0.17, 0.4)),
        ("soft", ellipse(x, y, 0.36, 0.28 + kidney / 4, 0.12, 0.17, -0.4)),
        ("fluid", ellipse(x, y, 0.06, 0.1, 0.08, 0.08)),
        ("bone", ellipse(x, y, 0, 0.36, 0.16, 0.13)),
        ("marrow", ellipse(x, y, 0, 0.36, 0.1, 0.08)),
        ("bone", box(x, y, 0, 0.54, 0.04, 0.08)),
    ]


def _chest(x, y, rng) -> list[Shape]:
    lung, heart = rng.uniform(0.31, 0.35), rng.uniform(0.2, 0.26)
    shapes = [
        ("fat", ellipse(x, y, 0, 0.02, 0.95, 0.86)),
        ("muscle", ellipse(x, y, 0, 0.02, 0.87, 0.78)),
        ("lung", ellipse(x, y, -0.42, 0, lung, 0.62, 0.12)),
        ("lung", ellipse(x, y, 0.42, 0, lung, 0.62, -0.12)),
        ("soft", ellipse(x, y, 0.08, 0.22, heart, 0.28, -0.5)),
        ("fluid", ellipse(x, y, 0, -0.2, 0.09, 0.12)),
        ("bone", box(x, y, 0, 0.72, 0.1, 0.1)),
    ]
    ribs = np.clip(0.04 - np.abs((y + 0.45 * x * x + 0.1) % 0.3 - 0.15), 0, 1) * SIZE / 2
    rim = ellipse(x, y, 0, 0.02, 0.87, 0.78) - ellipse(x, y, 0, 0.02, 0.76, 0.68)
    return shapes + [("bone", np.clip(ribs, 0, 1) * np.clip(rim, 0, 1))]


def _pelvis(x, y, rng) -> list[Shape]:
    wing = rng.uniform(0.28, 0.36)
    shapes = [
        ("fat", ellipse(x, y, 0, 0, 0.96, 0.8)),
        ("muscle", ellipse(x, y, 0, 0, 0.86, 0.7)),
        ("soft", ellipse(x, y, 0, 0.1, 0.3, 0.3)),
        ("fluid", ellipse(x, y, 0, 0.14, 0.18, 0.15)),
    ]
    for side in (-1, 1):
        for tissue, rim in (("bone", 0.0), ("marrow", 0.05)):
            shapes += [
                (tissue, ellipse(x, y, side * 0.46, -0.26, 0.15 - rim, wing - rim, side * 0.6)),
                (tissue, ellipse(x, y, side * 0.6, 0.34, 0.17 - rim, 0.17 - rim)),
                (tissue, box(x, y, side * 0.72, 0.56, 0.08 - rim, 0.18, side * -0.4)),
            ]
    return shapes + [
        ("bone", ellipse(x, y, 0, -0.4, 0.2, 0.2)),
        ("marrow", ellipse(x, y, 0, -0.4, 0.13, 0.13)),
        ("bone", box(x, y, 0, 0.5, 0.24, 0.04)),
    ]


def _hand(x, y, rng) -> list[Shape]:
    spread = rng.uniform(0.9, 1.1)
    fingers = [
        (-0.62, 0.0, 0.9, 0.34),
        (-0.32, -0.34, 0.24, 0.5),
        (-0.08, -0.42, 0.06, 0.54),
        (0.16, -0.38, -0.08, 0.52),
        (0.4, -0.26, -0.24, 0.44),
    ]
    shapes = [
        ("soft", ellipse(x, y, -0.04, 0.42, 0.44, 0.42)),
        ("soft", box(x, y, -0.04, 0.95, 0.26, 0.2)),
    ]
    for cx, cy, tilt, length in fingers:
        shapes.append(("soft", box(x, y, cx * spread, cy, 0.1, length, -tilt)))
    for cx, cy, tilt, length in fingers:
        dx, dy = np.sin(tilt), -np.cos(tilt)
        for part in (-0.75, -0.1, 0.5):
            along = -part * length
            shapes.append(
                (
                    "bone",
                    box(
                        x, y, cx * spread - dx * along, cy - dy * along, 0.045, length * 0.26, -tilt
                    ),
                )
            )
    for cx, cy in ((-0.22, 0.62), (-0.04, 0.6), (0.14, 0.62), (-0.14, 0.76), (0.06, 0.76)):
        shapes.append(("bone", ellipse(x, y, cx, cy, 0.08, 0.07)))
    return shapes


def _mass(image, dx, dy, modality, rng) -> np.ndarray:
    """A lobed ball with a darker core."""
    lobes = 1 + 0.07 * np.cos(rng.integers(3, 6) * np.arctan2(dy, dx) + rng.uniform(0, 6))
    radius = rng.uniform(0.2, 0.27)
    ball, core = (
        ellipse(dx / lobes, dy / lobes, 0, 0, radius, radius),
        ellipse(dx, dy, 0, 0, radius / 2, radius / 2),
    )
    return image + ball * (0.95 - image) - 0.35 * core


def _fracture(image, dx, dy, modality, rng) -> np.ndarray:
    """A jagged black line between two white lips."""
    tilt, tooth = rng.uniform(-0.7, 0.7), rng.uniform(0.16, 0.22)
    along, across = np.cos(tilt) * dx + np.sin(tilt) * dy, -np.sin(tilt) * dx + np.cos(tilt) * dy
    jag = np.abs((along / tooth + rng.uniform(0, 1)) % 1 - 0.5) * 0.28 - 0.07
    within = box(along, across, 0, 0, rng.uniform(0.3, 0.36), 0.4)
    lips = np.clip(3.4 - np.abs(across - jag) * SIZE / 2, 0, 1) * within
    crack = np.clip(1.8 - np.abs(across - jag) * SIZE / 2, 0, 1) * within
    image = image + lips * (0.9 - image)
    return image - crack * image


def _effusion(image, dx, dy, modality, rng) -> np.ndarray:
    """A pool with a level surface, smooth as no tissue is."""
    width, depth = rng.uniform(0.3, 0.36), rng.uniform(0.26, 0.34)
    pool = ellipse(dx, dy, 0, -0.12, width, depth) * np.clip((dy + 0.1) * SIZE / 2 + 0.5, 0, 1)
    surface = np.clip(1.2 - np.abs(dy + 0.1) * SIZE / 2, 0, 1) * (np.abs(dx) < width)
    grey = {"MRI": 1.0, "CT": 0.7, "radiograph": 0.85}[modality]
    image = image + pool * (grey - image)
    return image + surface * (0.1 - image)


def _calcification(image, dx, dy, modality, rng) -> np.ndarray:
    """A cluster of specks: signal voids in MRI, white elsewhere, each with a contrasting halo."""
    grey, halo = (0.0, 0.85) if modality == "MRI" else (1.0, 0.12)
    count = rng.integers(6, 10)
    angles = np.arange(count) * 2.4 + rng.uniform(
        0, 6
    )  # the golden angle spreads the specks evenly
    radii = 0.26 * np.sqrt((np.arange(count) + 0.5) / count)
    specks = list(zip(radii * np.cos(angles), radii * np.sin(angles)))
    for cx, cy in specks:
        image = image + ellipse(dx, dy, cx, cy, 0.085, 0.085) * (halo - image)
    for cx, cy in specks:
        image = image + ellipse(dx, dy, cx, cy, 0.05, 0.05) * (grey - image)
    return image


_BODIES = {
    "brain": _brain,
    "knee": _knee,
    "spine": _spine,
    "abdomen": _abdomen,
    "chest": _chest,
    "pelvis": _pelvis,
    "hand": _hand,
}
_FINDINGS = {
    "mass": _mass,
    "fracture": _fracture,
    "effusion": _effusion,
    "calcification": _calcification,
}

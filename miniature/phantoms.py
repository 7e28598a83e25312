"""Phantoms: stylised radiology drawn with numpy, 84 x 84 pixels of grey, a pure function of a seed.

Seven body parts in three renderings. CT and MRI are slices: each tissue is painted over what lies
beneath it, with the grey of the modality (bone is white in CT and black in MRI, fluid dark in CT
and bright in MRI). A radiograph is a projection: tissues add up along the beam, so bones shine
through. A finding lies on the left or the right half of the image. Coordinates: x to the right and
y downwards, both from -1 to 1 over the frame.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

SIZE = 84  # three merge blocks of 28 pixels a side: nine image tokens, which a CPU can afford
HALF = SIZE // 2  # pixels from the middle to the edge: what the coordinate 1 is
MODALITIES = ("MRI", "CT", "radiograph")
ANATOMIES = ("brain", "knee", "spine", "abdomen", "chest", "pelvis", "hand")
FINDINGS = ("normal", "mass", "fracture", "effusion", "calcification")
SIDES = ("left", "right")
ATTRIBUTES = {"modality": MODALITIES, "anatomy": ANATOMIES, "finding": FINDINGS, "side": SIDES}

Array = np.ndarray
# Tissue, form, centre x and y, radii x and y, tilt, and how far the form is bowed as a spine is.
Body = list[tuple[str, str, float, float, float, float, float, float]]

# Grey of each tissue in MRI and in CT; for radiographs, how much it adds to the shadow.
GREYS = {
    "fat": (0.78, 0.24, 0.16),
    "muscle": (0.30, 0.44, 0.10),
    "soft": (0.45, 0.50, 0.12),
    "pale": (0.60, 0.58, 0.06),  # white matter, liver
    "bone": (0.06, 0.96, 0.34),
    "marrow": (0.66, 0.74, 0.06),
    "fluid": (0.92, 0.36, 0.05),
    "lung": (0.04, 0.08, -0.20),  # air takes away from the shadow of the chest around it
}


@dataclass(frozen=True)
class Case:
    """What a phantom shows; `side` is None exactly when the finding is "normal"."""

    modality: str
    anatomy: str
    finding: str
    side: str | None

    @property
    def known(self) -> dict[str, str]:
        """Attribute -> value, in the order of ATTRIBUTES, without a side that is None."""
        return {name: value for name, value in vars(self).items() if value is not None}


def sample_case(rng: Generator, modality: str | None = None) -> Case:
    """A case with every attribute uniform and independent (the modality may be given)."""
    modality = modality or str(rng.choice(MODALITIES))
    finding = str(rng.choice(FINDINGS))
    side = None if finding == "normal" else str(rng.choice(SIDES))
    return Case(modality, str(rng.choice(ANATOMIES)), finding, side)


def draw(case: Case, rng: Generator) -> Array:
    """Draw a case: uint8 [84, 84]. Pose, proportions, texture and noise come from `rng`."""
    grid = np.linspace(-1, 1, SIZE, dtype=np.float32)
    frame_x, frame_y = np.meshgrid(grid, grid)
    angle = rng.uniform(-0.15, 0.15)
    scale = rng.uniform(0.92, 1.08)
    shift_x, shift_y = rng.uniform(-0.06, 0.06, 2)
    x, y = turned(frame_x - shift_x, frame_y - shift_y, angle, scale)

    image = _body(case, x, y, rng)
    image = _scanned(image, case.modality, frame_x, frame_y, rng)
    if case.side:
        # So far from the midline that no shift or turn of the body takes it across.
        sign = -1 if case.side == "left" else 1
        at_x = sign * rng.uniform(0.32, 0.5)
        at_y = rng.uniform(-0.3, 0.3)
        image = _FINDINGS[case.finding](image, x - at_x, y - at_y, case.modality, rng)
    # Brightness and contrast of every image differ: no absolute grey gives a modality away.
    image = image * rng.uniform(0.9, 1.1) + rng.uniform(-0.03, 0.03)
    image = image + rng.normal(0, 0.025, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8)


def _body(case: Case, x: Array, y: Array, rng: Generator) -> Array:
    image: Array = np.zeros(x.shape, np.float32)  # rounds the first grey, as in what is shipped
    column = MODALITIES.index(case.modality)
    for tissue, form, cx, cy, rx, ry, tilt, bow in _BODIES[case.anatomy](rng):
        dx = x - bow * np.sin(2 * y) - cx if bow else x - cx
        dy = y - cy
        if tilt:  # most are upright, which saves much time
            dx, dy = turned(dx, dy, tilt)
        covered = _FORMS[form](dx, dy, rx, ry)
        grey = GREYS[tissue][column]
        if case.modality == "radiograph":
            image = image + covered * grey
        else:
            image = painted(image, covered, grey)
    return image


def _scanned(image: Array, modality: str, x: Array, y: Array, rng: Generator) -> Array:
    """The image with what the modality's machine adds to it: float32 [84, 84]."""
    if modality == "MRI":  # the receive coil sees one side better than the other
        slope_x, slope_y = rng.uniform(-0.12, 0.12, 2)
        image = image * (1 + slope_x * x + slope_y * y)
    elif modality == "CT":  # the table lies under the patient; beyond the field of view is nothing
        table = (1 - abs(y + 0.15 * x**2 - 0.93) * SIZE / 3).clip(0, 1)
        field_of_view = ellipse(x, y, 1.04, 1.04)
        image = np.maximum(image, 0.5 * table) * field_of_view
        image = image + rng.normal(0, 0.03, image.shape)  # a low dose makes CT grainy
    else:  # scattered light fogs the film
        image = 0.14 + 0.08 * y * rng.uniform(-1, 1) + image
    return image.astype(np.float32)


# Forms: masks [84, 84] in 0..1 around the origin of their coordinates.


def turned(x: Array, y: Array, angle: float, scale: float = 1) -> tuple[Array, Array]:
    """Coordinates along axes that are turned by `angle` and `scale` times as long."""
    cos = np.cos(angle) / scale
    sin = np.sin(angle) / scale
    return cos * x + sin * y, cos * y - sin * x


def soft_edge(depth: Array) -> Array:
    """1 inside, 0 outside, by the depth below an edge that is one pixel wide."""
    return (depth * HALF + 0.5).clip(0, 1)


def stroke(distance: Array, pixels: float) -> Array:
    """A line about `pixels` wide to each side of where `distance` is 0."""
    return (pixels - abs(distance) * HALF).clip(0, 1)


def painted(image: Array, covered: Array, grey: float) -> Array:
    """The image with an opaque colour over it."""
    return image + covered * (grey - image)


def ellipse(x: Array, y: Array, rx: float, ry: float) -> Array:
    distance = np.sqrt((x / rx) ** 2 + (y / ry) ** 2)
    return soft_edge((1 - distance) * min(rx, ry))


def box(x: Array, y: Array, rx: float, ry: float) -> Array:
    return soft_edge(np.minimum(rx - abs(x), ry - abs(y)))


def ribs(x: Array, y: Array, rx: float, ry: float) -> Array:
    """Arcs, one every 0.3 downwards, where the chest wall is."""
    arcs = 0.04 - abs((y + 0.45 * x * x + 0.1) % 0.3 - 0.15)
    wall = ellipse(x, y - 0.02, rx, ry) - ellipse(x, y - 0.02, 0.76, 0.68)
    return (arcs * HALF).clip(0, 1) * wall


_FORMS = {"ellipse": ellipse, "box": box, "ribs": ribs}


def shapes(table: str) -> Body:
    """The rows of a table, whose last columns may be left out where they are 0; a ± before the
    first number makes two rows, the mirror image on the left and then the shape itself.
    """
    body: Body = []
    for row in table.strip().splitlines():
        tissue, form, *words = row.partition("#")[0].split()
        numbers = [float(word.lstrip("±")) for word in words]
        cx, cy, rx, ry, tilt, bow = numbers + [0.0] * (6 - len(numbers))
        if words[0].startswith("±"):
            body.append((tissue, form, -cx, cy, rx, ry, -tilt, bow))
        body.append((tissue, form, cx, cy, rx, ry, tilt, bow))
    return body


# Body parts: shapes from the skin inwards, since the later ones cover the earlier. The numbers have
# no source but the eye; what `rng` draws is what differs between patients.


def _brain(rng: Generator) -> Body:
    ry = rng.uniform(0.8, 0.88)
    gap = rng.uniform(0.09, 0.13)
    tilt = rng.uniform(0.1, 0.3)
    return shapes(f"""
        fat    ellipse   0      0     0.72  {ry}
        bone   ellipse   0      0     0.66  {ry - 0.06}
        soft   ellipse   0      0     0.57  {ry - 0.15}
        pale   ellipse   0      0     0.42  {ry - 0.32}
        fluid  ellipse  ±{gap} -0.08  0.06  0.24  {-tilt}  # ventricles
        fluid  box       0     -0.6   0.015 0.12
    """)


def _knee(rng: Generator) -> Body:
    gap = rng.uniform(0.05, 0.09)
    width = rng.uniform(0.24, 0.3)
    table = """
        fat     box  0  0  0.68  1.2
        muscle  box  0  0  0.58  1.2"""
    # All bone before all marrow: the femur's shaft and condyles overlap, and are one bone.
    for tissue, rim in (("bone", 0.0), ("marrow", 0.06)):
        table += f"""
        {tissue}  box       0    -0.72         {width - rim}         0.52
        {tissue}  ellipse  ±0.2  {-0.22 - gap} {0.29 - rim}          {0.24 - rim}
        {tissue}  box       0    {0.14 + gap}  {0.47 - rim}          {0.14 - rim}
        {tissue}  box       0     0.72         {width - 0.04 - rim}  0.5"""
    return shapes(f"{table}\nfluid box 0 -0.03 0.46 {gap * 0.5}")


def _spine(rng: Generator) -> Body:
    half = rng.uniform(0.17, 0.22)
    pitch = rng.uniform(0.34, 0.4)
    bow = 0.08 * rng.uniform(-1, 1)
    table = f"""
        fat     box  0              0  0.8   1.2
        muscle  box  0              0  0.7   1.2
        fluid   box  {half + 0.12}  0  0.05  1.2  0  {bow}  # the canal"""
    height = pitch * 0.38  # half a vertebra's; the rest of the pitch is its disc
    for level in range(-3, 4):  # the outermost ones leave the frame
        cy = level * pitch
        table += f"""
        bone    box  0             {cy}  {half}         {height}         0    {bow}
        marrow  box  0             {cy}  {half - 0.05}  {height - 0.05}  0    {bow}
        bone    box  {half + 0.3}  {cy}  0.1            0.04             0.5  {bow}"""
    return shapes(table)


def _abdomen(rng: Generator) -> Body:
    kidney = rng.uniform(0.1, 0.2)
    return shapes(f"""
        fat     ellipse   0      0     0.94  0.72
        muscle  ellipse   0      0     0.84  0.62
        fat     ellipse   0.02   0.02  0.78  0.55
        pale    ellipse  -0.42  -0.12  0.36  0.34   0.4  # liver
        soft    ellipse   0.5   -0.1   0.2   0.28  -0.5  # spleen
        soft    ellipse   0.15  -0.28  0.2   0.12
        soft    ellipse  ±0.36  {0.28 + kidney / 4}  0.12  0.17  -0.4
        fluid   ellipse   0.06   0.1   0.08  0.08        # aorta
        bone    ellipse   0      0.36  0.16  0.13
        marrow  ellipse   0      0.36  0.1   0.08
        bone    box       0      0.54  0.04  0.08
    """)


def _chest(rng: Generator) -> Body:
    lung = rng.uniform(0.31, 0.35)
    heart = rng.uniform(0.2, 0.26)
    return shapes(f"""
        fat     ellipse   0      0.02  0.95     0.86
        muscle  ellipse   0      0.02  0.87     0.78
        lung    ellipse  ±0.42   0     {lung}   0.62  -0.12
        soft    ellipse   0.08   0.22  {heart}  0.28  -0.5
        fluid   ellipse   0     -0.2   0.09     0.12
        bone    box       0      0.72  0.1      0.1
        bone    ribs      0      0     0.87     0.78
    """)


def _pelvis(rng: Generator) -> Body:
    wing = rng.uniform(0.28, 0.36)
    table = """
        fat     ellipse  0  0     0.96  0.8
        muscle  ellipse  0  0     0.86  0.7
        soft    ellipse  0  0.1   0.3   0.3
        fluid   ellipse  0  0.14  0.18  0.15  # bladder"""
    for tissue, rim in (("bone", 0.0), ("marrow", 0.05)):
        table += f"""
        {tissue}  ellipse  ±0.46  -0.26  {0.15 - rim}  {wing - rim}   0.6
        {tissue}  ellipse  ±0.6    0.34  {0.17 - rim}  {0.17 - rim}
        {tissue}  box      ±0.72   0.56  {0.08 - rim}  0.18          -0.4"""
    return shapes(f"""{table}
        bone    ellipse  0  -0.4  0.2   0.2
        marrow  ellipse  0  -0.4  0.13  0.13
        bone    box      0   0.5  0.24  0.04
    """)


_FINGERS = (  # centre, tilt, half length
    (-0.62, 0.0, 0.9, 0.34),
    (-0.32, -0.34, 0.24, 0.5),
    (-0.08, -0.42, 0.06, 0.54),
    (0.16, -0.38, -0.08, 0.52),
    (0.4, -0.26, -0.24, 0.44),
)


def _hand(rng: Generator) -> Body:
    width = rng.uniform(0.9, 1.1)
    flesh = shapes("""
        soft  ellipse  -0.04  0.42  0.44  0.42
        soft  box      -0.04  0.95  0.26  0.2
    """)
    bones: Body = []
    for cx, cy, tilt, length in _FINGERS:
        cx *= width
        flesh.append(("soft", "box", cx, cy, 0.1, length, -tilt, 0))
        for joint in (-0.75, -0.1, 0.5):
            along = joint * length
            bone_x = cx + np.sin(tilt) * along
            bone_y = cy - np.cos(tilt) * along
            bones.append(("bone", "box", bone_x, bone_y, 0.045, length * 0.26, -tilt, 0))
    wrist = shapes("""
        bone  ellipse  -0.22  0.62  0.08  0.07
        bone  ellipse  -0.04  0.6   0.08  0.07
        bone  ellipse   0.14  0.62  0.08  0.07
        bone  ellipse  -0.14  0.76  0.08  0.07
        bone  ellipse   0.06  0.76  0.08  0.07
    """)
    return flesh + bones + wrist  # in a slice, a finger's flesh would cover its neighbour's bones


# Findings: what they add to an image, at coordinates (dx, dy) from their centre. They are coarse
# and strong on purpose: of all attributes the finding is the hardest to see at 84 pixels, and what
# the vision tower misses no reward can bring back.


def _mass(image: Array, dx: Array, dy: Array, modality: str, rng: Generator) -> Array:
    """A lobed ball with a darker core."""
    lobes = 1 + 0.07 * np.cos(rng.integers(3, 6) * np.arctan2(dy, dx) + rng.uniform(0, 6))
    radius = rng.uniform(0.2, 0.27)
    ball = ellipse(dx / lobes, dy / lobes, radius, radius)
    core = ellipse(dx, dy, radius / 2, radius / 2)
    return painted(image, ball, 0.95) - 0.35 * core


def _fracture(image: Array, dx: Array, dy: Array, modality: str, rng: Generator) -> Array:
    """A jagged black line between two white lips."""
    tilt = rng.uniform(-0.7, 0.7)
    tooth = rng.uniform(0.16, 0.22)
    along, across = turned(dx, dy, tilt)
    jag = abs((along / tooth + rng.uniform(0, 1)) % 1 - 0.5) * 0.28 - 0.07
    within = box(along, across, rng.uniform(0.3, 0.36), 0.4)
    image = painted(image, stroke(across - jag, 3.4) * within, 0.9)
    return painted(image, stroke(across - jag, 1.8) * within, 0)


def _effusion(image: Array, dx: Array, dy: Array, modality: str, rng: Generator) -> Array:
    """A pool with a level surface, smooth as no tissue is."""
    width = rng.uniform(0.3, 0.36)
    depth = rng.uniform(0.26, 0.34)
    pool = ellipse(dx, dy + 0.12, width, depth) * soft_edge(dy + 0.1)
    surface = stroke(dy + 0.1, 1.2) * (abs(dx) < width)
    grey = {"MRI": 1.0, "CT": 0.7, "radiograph": 0.85}[modality]
    return painted(painted(image, pool, grey), surface, 0.1)


def _calcification(image: Array, dx: Array, dy: Array, modality: str, rng: Generator) -> Array:
    """A cluster of specks: signal voids in MRI, white elsewhere, each with a contrasting halo."""
    grey, halo = (0.0, 0.85) if modality == "MRI" else (1.0, 0.12)
    order = np.arange(rng.integers(6, 10))
    angles = order * 2.4 + rng.uniform(0, 6)  # the golden angle: specks lie evenly, as in a flower
    radii = 0.26 * np.sqrt((order + 0.5) / len(order))
    # All halos before all specks, or a neighbour's halo would cover a speck.
    for radius, shade in ((0.085, halo), (0.05, grey)):
        for cx, cy in zip(radii * np.cos(angles), radii * np.sin(angles), strict=True):
            image = painted(image, ellipse(dx - cx, dy - cy, radius, radius), shade)
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

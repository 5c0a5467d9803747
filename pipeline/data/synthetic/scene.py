"""One synthetic picture: a cluttered background, people in front of each other, things in front of them, a camera's
flaws, and the truth about all of it.

Everything is painted at twice the resolution and averaged down, which is the antialiasing. Image points are (x, y) in
pixels, origin at the centre of the top-left pixel; the canvas point of image point p is 2 p + 0.5.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.data.synthetic.backdrop import degrade, paint_background, paint_obstacle
from pipeline.data.synthetic.body import FACE_NORMALS, JOINTS, SIDES, Body, articulate, sample_pose, sample_proportions
from pipeline.data.synthetic.config import SyntheticConfig
from pipeline.data.synthetic.figure import Camera, Part, build_figure, fill
from pipeline.data.synthetic.outfit import sample_outfit

SUPERSAMPLING = 2
_OBSTACLE = 32000
_PARTS_PER_PERSON = 32
_NEARER = 0.07
"""A joint counts as covered by its owner's other parts from this difference in depth, in statures: a shoulder is under
the shirt but not hidden by it, the far shoulder in a side view is."""
_NEARER_FACE = 0.02

_LIMBS = {
    **{"shoulder": ("upper_arm",), "elbow": ("upper_arm", "forearm"), "wrist": ("forearm", "hand")},
    **{"hip": ("thigh",), "knee": ("thigh", "shin"), "ankle": ("shin", "foot")},
}
_OWN_PARTS = {
    **{name: ("head",) for name in (*FACE_NORMALS, "head_top")},
    **{f"{side}_{at}": tuple(f"{side}_{limb}" for limb in limbs) for side, _ in SIDES for at, limbs in _LIMBS.items()},
    **{
        "neck": ("neck", "head"),
        "upper_neck": ("neck", "head"),
        "thorax": ("neck", "chest"),
        "pelvis": ("hips", "skirt"),
    },
}
"""The parts that show a joint, so that they can't hide it."""


@dataclass(frozen=True, slots=True)
class Habits:
    """What the annotators of one dataset leave out."""

    drop_occluded: float
    """Share of the occluded joints that are not labelled."""
    drop_turned: float
    """Share of the face's points on the averted side of the head that are not labelled."""
    bystanders: bool
    """Whether small people without keypoints and crowds occur."""


@dataclass(frozen=True, slots=True)
class Person:
    """The truth about one person in one image, in image pixels."""

    points: np.ndarray
    """(22, 2) float64, all of `JOINTS`, also where not labelled."""
    visibility: np.ndarray
    """(22,) int64: 0 not labelled, 1 occluded but labelled, 2 visible."""
    box: tuple[float, float, float, float]
    """x, y, width, height of the silhouette as if nothing stood before it, clipped to the image."""
    extent: tuple[float, float, float, float]
    """x, y, width, height of the silhouette beyond the image's border too."""
    head_box: tuple[float, float, float, float]
    """x1, y1, x2, y2 around skull and chin."""
    mask: np.ndarray
    """(2 H, 2 W) bool, the silhouette on the canvas."""
    exposed: float
    """Share of the silhouette that is not hidden."""
    yaw: float
    """Degrees; 0 faces the viewer, 180 turns the back."""
    family: str
    """Of the pose."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture with everybody in it."""

    image: np.ndarray
    """(H, W, 3) uint8, blue, green, red."""
    people: tuple[Person, ...]
    bystanders: tuple[Person, ...]
    """Annotated as people, without keypoints."""
    crowd: np.ndarray | None
    """(2 H, 2 W) bool, the canvas mask of a group annotated as one region."""


@dataclass(slots=True)
class _Actor:
    """A person who is about to be painted."""

    body: Body
    camera: Camera
    parts: list[Part]
    yaw: float
    family: str


def render_scene(rng: np.random.Generator, count: int, config: SyntheticConfig, habits: Habits) -> Scene:
    """Paints `count` labelled people (and bystanders, if it is the dataset's habit)."""
    low, high = config.image_size
    width, height = (int(side) for side in rng.integers(low, high + 1, 2))
    canvas = paint_background(rng, width * SUPERSAMPLING, height * SUPERSAMPLING, config.variety)
    light = np.array((rng.uniform(-1, 1), rng.uniform(-1, -0.2)))
    light = tuple(light / np.linalg.norm(light))
    extras, is_crowd = _sample_extras(rng, (width, height), config, light) if habits.bystanders else ([], False)
    statures = np.sort(rng.uniform(*config.person_height, count) * min(1.0, 1.08 - 0.08 * count))
    slots = rng.permutation(count)
    actors = [
        _cast(rng, (width, height), float(size), (slot + 0.5) / count, config, light)
        for size, slot in zip(statures, slots, strict=True)
    ]
    ids = np.zeros(canvas.shape[:2], np.int16)
    masks = [_paint(canvas, ids, actor, index) for index, actor in enumerate([*extras, *actors])]
    if rng.random() < config.obstacles:
        for _ in range(int(rng.integers(1, 3))):
            target = actors[int(rng.integers(count))]
            joint = target.camera.project(target.body.joints[JOINTS[int(rng.integers(5, 17))]])
            paint_obstacle(rng, canvas, ids, _OBSTACLE, joint[:2], target.camera.scale)
    everyone = [
        _witness(rng, actor, mask, ids, index, habits)
        for index, (actor, mask) in enumerate(zip([*extras, *actors], masks, strict=True))
    ]
    crowd = np.logical_or.reduce(masks[: len(extras)]) & (ids <= len(extras) * _PARTS_PER_PERSON) if is_crowd else None
    small = [] if is_crowd else [person for person in everyone[: len(extras)] if person.exposed > 0.3]
    image = degrade(rng, cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA))
    return Scene(image, tuple(everyone[len(extras) :]), tuple(small), crowd if crowd is None or crowd.any() else None)


def _cast(
    rng: np.random.Generator,
    size: tuple[int, int],
    stature: float,
    place: float,
    config: SyntheticConfig,
    light: tuple[float, float],
) -> _Actor:
    """One person of about `stature` pixels, put near `place` (0 left, 1 right) so that most of the body is inside."""
    pose, pitch = sample_pose(rng, config.variety), float(rng.normal(6, 8))
    body = articulate(sample_proportions(rng), pose, pitch)
    points = np.stack(list(body.joints.values()))
    distance = float(rng.uniform(3.5, 9.0))
    spread = Camera(1.0, (0.0, 0.0), distance).project(points)[:, :2]
    low, high = spread.min(0) - 0.06, spread.max(0) + 0.06
    scale = min(stature, float((np.array(size) / (high - low)).min()))
    centre = np.array((place * size[0], size[1] * 0.5)) + rng.normal(0, (0.10 * size[0], 0.12 * size[1]))
    lowest, highest = -low * scale, np.array(size) - high * scale
    centre = np.clip(centre - 0.5 * (low + high) * scale, lowest, highest)
    if rng.random() < config.truncation:
        zoom = float(rng.uniform(1.0, 1.5))
        scale *= zoom
        moved = centre + rng.normal(0, 0.22, 2) * (high - low) * scale
        inside = np.abs(spread * scale + moved - np.array(size) / 2) < np.array(size) / 2 - 3
        if inside.all(1).sum() >= 16:
            centre = moved
        else:
            scale /= zoom
    camera = Camera(scale * SUPERSAMPLING, tuple(centre * SUPERSAMPLING), distance)
    return _Actor(body, camera, build_figure(body, sample_outfit(rng), camera, light), pose.yaw, pose.family)


def _sample_extras(
    rng: np.random.Generator, image: tuple[int, int], config: SyntheticConfig, light: tuple[float, float]
) -> tuple[list[_Actor], bool]:
    """Nobody mostly, else a few small people far off, or a crowd."""
    kind = rng.random()
    if kind > 0.11:
        return [], False
    crowd = bool(kind < 0.04)
    size, middle = float(rng.uniform(20, 34)), float(rng.uniform(0.2, 0.8))
    level = rng.uniform(0.2, 0.5) * image[1]
    whole = config.model_copy(update={"truncation": 0.0})
    found = []
    for index in range(int(rng.integers(4, 8)) if crowd else int(rng.integers(1, 3))):
        place = middle + (index - 3) * 0.4 * size / image[0] if crowd else rng.uniform(0.05, 0.95)
        actor = _cast(rng, image, size * rng.uniform(0.9, 1.1), place, whole, light)
        shift = level + rng.normal(0, 2) - actor.camera.centre[1] / SUPERSAMPLING
        camera = Camera(
            actor.camera.scale,
            (actor.camera.centre[0], actor.camera.centre[1] + shift * SUPERSAMPLING),
            actor.camera.distance,
        )
        parts = build_figure(actor.body, sample_outfit(rng), camera, light)
        found.append(_Actor(actor.body, camera, parts, actor.yaw, actor.family))
    return found, crowd


def _paint(canvas: np.ndarray, ids: np.ndarray, actor: _Actor, index: int) -> np.ndarray:
    """Paints one person over what is there, marks whose part covers each canvas pixel, and returns the silhouette."""
    own = np.zeros(ids.shape, np.uint8)
    for number, part in enumerate(actor.parts, 1):
        for polygon, colour, solid in part.shapes:
            fill(canvas, polygon, colour)
            if solid:
                fill(own, polygon, number)
    mask = own > 0
    np.copyto(ids, own.astype(np.int16) + index * _PARTS_PER_PERSON, where=mask)
    return mask


def _witness(
    rng: np.random.Generator, actor: _Actor, mask: np.ndarray, ids: np.ndarray, index: int, habits: Habits
) -> Person:
    """What the finished picture shows of one person."""
    height, width = ids.shape
    projected = actor.camera.project(np.stack([actor.body.joints[name] for name in JOINTS]))
    seen, dropped = np.zeros(len(JOINTS), np.int64), np.zeros(len(JOINTS), bool)
    chance = rng.random(len(JOINTS))
    for j, name in enumerate(JOINTS):
        column, row = (int(c) for c in np.round(projected[j, :2]))
        if not (1 <= column < width - 1 and 1 <= row < height - 1):
            continue
        turned = _is_turned_away(actor.body, name)
        hidden = turned or _is_covered(actor, name, projected[j], int(ids[row, column]) - index * _PARTS_PER_PERSON)
        dropped[j] = hidden and chance[j] < (habits.drop_turned if turned else habits.drop_occluded)
        seen[j] = 1 if hidden else 2
    outline = np.concatenate([p[:, 0] for part in actor.parts for p, _, solid in part.shapes if solid]) / 16
    (x1, y1), (x2, y2) = (_to_image(outline.min(0)), _to_image(outline.max(0)))
    visible = (ids > index * _PARTS_PER_PERSON) & (ids <= (index + 1) * _PARTS_PER_PERSON)
    return Person(
        points=_to_image(projected[:, :2]),
        visibility=np.where(dropped & ((seen == 2).sum() >= 3), 0, seen),
        box=mask_box(mask),
        extent=(float(x1), float(y1), float(x2 - x1), float(y2 - y1)),
        head_box=_head_box(actor),
        mask=mask,
        exposed=float(visible.sum() / max(mask.sum(), 1)),
        yaw=actor.yaw,
        family=actor.family,
    )


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """x, y, width, height in image pixels of a canvas mask; zeros if it is empty."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(columns):
        return (0.0, 0.0, 0.0, 0.0)
    x, y = columns[0] / SUPERSAMPLING, rows[0] / SUPERSAMPLING
    return (x, y, (columns[-1] + 1) / SUPERSAMPLING - x, (rows[-1] + 1) / SUPERSAMPLING - y)


def _is_turned_away(body: Body, name: str) -> bool:
    normal = FACE_NORMALS.get(name)
    return normal is not None and float(body.frames["head"][2] @ normal) < -0.05


def _is_covered(actor: _Actor, name: str, point: np.ndarray, own: int) -> bool:
    """Whether something noticeably nearer lies over a joint.

    `own` is what is seen there: the person's parts count from 1, all that was painted before is below, and all that
    came later above.
    """
    if not 1 <= own <= len(actor.parts):
        return own > 0
    part = actor.parts[own - 1]
    if part.name in _OWN_PARTS[name]:
        return False
    a, b = part.axis
    along = b[:2] - a[:2]
    t = float(np.clip((point[:2] - a[:2]) @ along / max(along @ along, 1e-9), 0, 1))
    nearer = a[2] + t * (b[2] - a[2]) - point[2]
    return bool(nearer > (_NEARER_FACE if name in FACE_NORMALS else _NEARER) * actor.body.proportions.size)


def _head_box(actor: _Actor) -> tuple[float, float, float, float]:
    """Around the projected ellipsoid of the skull, which reaches from the chin to the top."""
    rotation, radii = actor.body.frames["head"], np.array(actor.body.proportions.head)
    middle = actor.camera.project(actor.body.joints["head"])
    zoom = actor.camera.scale * actor.camera.distance / (actor.camera.distance - middle[2])
    half = zoom * np.sqrt(((rotation[:2] * radii) ** 2).sum(1))
    (x1, y1), (x2, y2) = _to_image(middle[:2] - half), _to_image(middle[:2] + half)
    return (float(x1), float(y1), float(x2), float(y2))


def _to_image(points: np.ndarray) -> np.ndarray:
    """Canvas to image points."""
    return (points - 0.5) / SUPERSAMPLING

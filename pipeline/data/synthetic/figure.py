"""How a synthetic person looks: clothes, and the painted parts of which the picture is made.

A part is a few filled polygons on the canvas with one depth, so that a person is painted from the farthest part to the
nearest. What tells left from right is what does so in photographs: face, collar and buckle in front, hair and a yoke
behind, and the way knees, elbows and feet point. The stripes that most people wear on one side change sides from person
to person: a mark that always sat on the left would contradict horizontal flips, in augmentation and in testing.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.data.synthetic.body import SIDES, Body
from pipeline.data.synthetic.outfit import Colour, Outfit, shade

_SHIFT = 4
_CIRCLE = np.stack([np.cos(np.arange(16) * np.pi / 8), np.sin(np.arange(16) * np.pi / 8)], 1)
_TURN = np.pi * (3 - np.sqrt(5)) * np.arange(220)
_HEIGHT = 1 - (2 * np.arange(220) + 1) / 220
_SPHERE = np.stack(
    [np.sqrt(1 - _HEIGHT**2) * np.cos(_TURN), _HEIGHT, np.sqrt(1 - _HEIGHT**2) * np.sin(_TURN)],
    1,
)


@dataclass(frozen=True, slots=True)
class Camera:
    """A weak pinhole: `project` maps (N, 3) points to canvas x, y and depth."""

    scale: float
    """Canvas pixels per stature at depth 0."""
    centre: tuple[float, float]
    """Canvas position of the pelvis."""
    distance: float
    """Of the eye, in statures."""

    def project(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) in the viewer's frame to (..., 3): canvas x, canvas y, z. Greater z is nearer."""
        zoom = self.scale * self.distance / (self.distance - points[..., 2])
        x = self.centre[0] + zoom * points[..., 0]
        return np.stack([x, self.centre[1] - zoom * points[..., 1], points[..., 2]], -1)


@dataclass(frozen=True, slots=True)
class Part:
    """One paintable piece of a person."""

    name: str
    order: float
    """Painted in ascending order."""
    shapes: tuple[tuple[np.ndarray, Colour, bool], ...]
    """(fixed-point polygon, colour, solid): solid shapes cover what lies behind them."""
    axis: np.ndarray
    """(2, 3) projected end points, to know the part's depth anywhere along it."""
    radius: float
    """Half thickness in statures."""


def build_figure(body: Body, outfit: Outfit, camera: Camera, light: tuple[float, float]) -> list[Part]:
    """The parts of one person, farthest first. `light` is a unit vector on the canvas, towards the lamp."""
    tailor = _Tailor(body, outfit, camera, light)
    parts = [*tailor.torso(), tailor.neck(), *tailor.head()]
    for side, _ in SIDES:
        parts += [*tailor.arm(side), *tailor.leg(side)]
    return sorted(parts, key=lambda part: part.order)


def hull(points: np.ndarray) -> np.ndarray:
    """Convex hull of (N, 2) canvas points as the fixed-point polygon that `fill` takes."""
    return cv2.convexHull(np.round(points * (1 << _SHIFT)).astype(np.int32))


def fill(image: np.ndarray, polygon: np.ndarray, colour: Colour | int) -> None:
    """Fills a convex fixed-point polygon in place."""
    cv2.fillConvexPoly(image, polygon, colour, cv2.LINE_8, _SHIFT)


class _Tailor:
    """Cuts one person's parts; holds what all of them need."""

    def __init__(self, body: Body, outfit: Outfit, camera: Camera, light: tuple[float, float]) -> None:
        self.body, self.outfit, self.camera = body, outfit, camera
        self.light = np.array(light)
        self.girth = body.proportions.girth
        self.at = {name: camera.project(point) for name, point in body.joints.items()}

    def _zoom(self, z: float) -> float:
        return self.camera.scale * self.camera.distance / (self.camera.distance - z)

    def _capsule(
        self,
        name: str,
        ends: tuple[str, str],
        radii: tuple[float, float],
        colour: Colour,
        order: float = 0.0,
        stripes: Colour | None = None,
    ) -> Part:
        """A tapered limb with a dark rim, a lit middle and a highlight, and bands across it if striped."""
        a, b = self.at[ends[0]], self.at[ends[1]]
        ra, rb = radii[0] * self._zoom(a[2]), radii[1] * self._zoom(b[2])
        shapes = []
        for width, move, factor in ((1.0, 0.0, 0.72), (0.8, 0.15, 1.0), (0.35, 0.4, 1.14)):
            rim_a = a[:2] + self.light * ra * move + ra * width * _CIRCLE
            rim_b = b[:2] + self.light * rb * move + rb * width * _CIRCLE
            shapes.append((hull(np.concatenate([rim_a, rim_b])), shade(colour, factor), width == 1.0))
        along = b[:2] - a[:2]
        length = float(np.hypot(*along))
        if stripes is not None and length > ra:
            across = np.array([-along[1], along[0]]) / length
            for t in (0.25, 0.5, 0.75):
                middle, half = a[:2] + t * along, 0.9 * (ra + t * (rb - ra)) * across
                step = 0.055 * along
                corners = [middle - half - step, middle + half - step, middle + half + step, middle - half + step]
                shapes.append((hull(np.array(corners)), stripes, False))
        depth = 0.5 * (a[2] + b[2])
        return Part(name, depth + order, tuple(shapes), np.stack([a, b]), max(radii))

    def arm(self, side: str) -> list[Part]:
        """Upper arm, forearm and hand."""
        o, g = self.outfit, self.girth
        stripes = o.accent if o.accent_side == side and o.sleeve else None
        upper = o.shirt if o.sleeve else o.skin
        lower = o.shirt if o.sleeve == 2 else o.skin
        elbow, wrist = f"{side}_elbow", f"{side}_wrist"
        ends = (f"{side}_shoulder", elbow)
        return [
            self._capsule(f"{side}_hand", (wrist, f"{side}_hand"), (0.017 * g, 0.023 * g), o.skin, 0.001),
            self._capsule(f"{side}_upper_arm", ends, (0.034 * g, 0.027 * g), upper, 0.0, stripes),
            self._capsule(
                f"{side}_forearm",
                (elbow, wrist),
                (0.027 * g, 0.018 * g),
                lower,
                0.004,
                stripes if o.sleeve == 2 else None,
            ),
        ]

    def leg(self, side: str) -> list[Part]:
        """Thigh, shin and shoe."""
        o, g = self.outfit, self.girth
        stripes = o.accent if o.accent_side == side else None
        thigh = shade(o.trousers, 0.95) if o.legs != 2 else o.skin
        shin = o.trousers if o.legs == 1 else o.skin
        knee, ankle = f"{side}_knee", f"{side}_ankle"
        stripes_below = stripes if o.legs == 1 else None
        ends = (f"{side}_hip", knee)
        return [
            self._capsule(f"{side}_foot", (f"{side}_heel", f"{side}_toe"), (0.024, 0.021), o.shoes, -0.002),
            self._capsule(f"{side}_thigh", ends, (0.058 * g, 0.041 * g), thigh, 0.0, stripes if o.legs != 2 else None),
            self._capsule(f"{side}_shin", (knee, ankle), (0.040 * g, 0.024 * g), shin, 0.002, stripes_below),
        ]

    def neck(self) -> Part:
        """Bare skin between collar and chin."""
        return self._capsule(
            "neck", ("thorax", "upper_neck"), (0.032 * self.girth, 0.028 * self.girth), self.outfit.skin, -0.008
        )

    def _ring(self, at: str, frame: str, half: tuple[float, float], up: float = 0.0) -> np.ndarray:
        """(16, 2) canvas points of an ellipse across the trunk."""
        offsets = np.stack([_CIRCLE[:, 0] * half[0], np.full(16, up), _CIRCLE[:, 1] * half[1]], 1)
        return self.camera.project(self.body.joints[at] + offsets @ self.body.frames[frame].T)[:, :2]

    def torso(self) -> list[Part]:
        """Chest and hips (and a skirt), with what is worn in front and behind."""
        o, g, p = self.outfit, self.girth, self.body.proportions
        shoulders = self._ring("thorax", "chest", (0.92 * p.shoulder, 0.042 * g), -0.004)
        chest = self._ring("thorax", "chest", (0.094 * g, 0.062 * g), -0.30 * p.torso)
        waist = self._ring("waist", "chest", (0.080 * g, 0.055 * g))
        hips = self._ring("pelvis", "pelvis", (p.hip + 0.036 * g, 0.062 * g), 0.01)
        seat = self._ring("pelvis", "pelvis", (p.hip + 0.030 * g, 0.058 * g), -0.045 * p.size)
        upper = self._solid(np.concatenate([shoulders, chest, waist]), o.shirt)
        if o.striped:
            rings = [shoulders + (waist - shoulders) * t for t in (0.25, 0.36, 0.52, 0.63, 0.79, 0.9)]
            pairs = zip(rings[::2], rings[1::2], strict=True)
            upper += [(hull(np.concatenate(pair) * 0.94 + _between(pair) * 0.06), o.accent, False) for pair in pairs]
        upper += self._trimmings()
        lower = self._solid(np.concatenate([waist, hips]), o.shirt if o.legs == 2 else shade(o.shirt, 0.97))
        lower += self._solid(np.concatenate([hips + 0.25 * (waist - hips), seat]), o.trousers)
        lower += self._patch("pelvis", "pelvis", ((-0.16, 0.012), (0.16, 0.012), (0.16, 0.04), (-0.16, 0.04)), o.accent)
        trunk = np.stack([self.at["waist"], self.at["thorax"]])
        base = np.stack([self.at["pelvis"], self.at["waist"]])
        parts = [
            Part("chest", float(trunk[:, 2].mean()) - 0.03, tuple(upper), trunk, 0.058 * g),
            Part("hips", float(base[:, 2].mean()) - 0.02, tuple(lower), base, 0.058 * g),
        ]
        return parts + ([self._skirt(hips)] if o.legs == 2 else [])

    def _skirt(self, hips: np.ndarray) -> Part:
        """Cloth from the hips to above the knees."""
        hem = []
        for side, _ in SIDES:
            thigh = self.at[f"{side}_hip"] + 0.72 * (self.at[f"{side}_knee"] - self.at[f"{side}_hip"])
            hem.append(thigh[:2] + 0.062 * self.girth * self._zoom(thigh[2]) * _CIRCLE)
        axis = np.stack([self.at["pelvis"], 0.5 * (self.at["left_knee"] + self.at["right_knee"])])
        order = max(self.at["left_knee"][2], self.at["right_knee"][2], 0.0) * 0.5 + 0.003
        return Part("skirt", order, tuple(self._solid(np.concatenate([hips, *hem]), self.outfit.trousers)), axis, 0.06)

    def _solid(self, points: np.ndarray, colour: Colour) -> list[tuple[np.ndarray, Colour, bool]]:
        """A dark rim and, moved to the light, the lit middle."""
        middle = points.mean(0)
        inner = middle + 0.88 * (points - middle) + self.light * 0.008 * self.camera.scale
        return [(hull(points), shade(colour, 0.74), True), (hull(inner), colour, False)]

    def _patch(
        self, at: str, frame: str, corners: tuple[tuple[float, float], ...], colour: Colour, front: bool = True
    ) -> list[tuple[np.ndarray, Colour, bool]]:
        """A flat mark on front or back; corners are in shoulder widths (across, up). Nothing if it faces away."""
        rotation = self.body.frames[frame]
        sign = 1.0 if front else -1.0
        if sign * rotation[2, 2] < 0.12:
            return []
        width = 2 * self.body.proportions.shoulder
        local = np.array([(x * width, y * width, sign * 0.052 * self.girth) for x, y in corners])
        return [(hull(self.camera.project(self.body.joints[at] + local @ rotation.T)[:, :2]), colour, False)]

    def _trimmings(self) -> list[tuple[np.ndarray, Colour, bool]]:
        """Collar and buttons in front, a yoke behind."""
        o = self.outfit
        collar = self._patch("thorax", "chest", ((-0.17, 0.0), (0.17, 0.0), (0.0, -0.32)), o.skin)
        buttons = self._patch(
            "thorax", "chest", ((-0.03, -0.3), (0.03, -0.3), (0.03, -0.95), (-0.03, -0.95)), shade(o.shirt, 0.5)
        )
        corners = ((-0.40, -0.02), (0.40, -0.02), (0.30, -0.5), (-0.30, -0.5))
        yoke = self._patch("thorax", "chest", corners, shade(o.shirt, 0.55), front=False) if o.yoke else []
        return buttons + collar + yoke

    def head(self) -> list[Part]:
        """Skull, ears, hair and, unless turned away, the face; long hair is a part of its own if it falls behind."""
        o, rotation, radii = self.outfit, self.body.frames["head"], np.array(self.body.proportions.head)
        surface = self.camera.project(self.body.joints["head"] + (_SPHERE * radii) @ rotation.T)[:, :2]
        facing = rotation[2, 2]
        shapes = self._ears(near=False)
        mane = self._mane() if o.hair_cut == 2 else []
        shapes += self._solid(surface, o.skin) + self._ears(near=True)
        if o.hair_cut:
            upward = np.array((0.0, 0.55, -0.83)) if o.hair_cut < 3 else np.array((0.0, 1.0, -0.05))
            worn = (_SPHERE @ upward > (0.18 if o.hair_cut < 3 else 0.42)) & (_SPHERE @ rotation[2] > -0.12)
            if worn.sum() > 2:
                middle = surface.mean(0)
                colour = o.hair if o.hair_cut < 3 else o.accent
                shapes.append((hull(middle + 1.06 * (surface[worn] - middle)), colour, True))
        shapes += self._face()
        shapes += mane if facing <= -0.15 else []
        axis = np.stack([self.at["upper_neck"], self.at["head_top"]])
        order = float(self.at["head"][2]) + 0.004
        parts = [Part("head", order, tuple(shapes), axis, float(radii[2]))]
        if mane and facing > -0.15:
            behind = min(order, float(self.at["thorax"][2])) - 0.06
            parts.append(Part("head", behind, tuple(mane), axis, float(radii[2])))
        return parts

    def _mane(self) -> list[tuple[np.ndarray, Colour, bool]]:
        """Long hair that falls to the shoulders at the back."""
        rotation, radii = self.body.frames["head"], self.body.proportions.head
        crown = (_SPHERE * radii * 1.08)[(_SPHERE[:, 2] < 0.1) & (_SPHERE[:, 1] > -0.3)]
        tips = np.array([(x * radii[0], -1.7 * radii[1], -0.75 * radii[2]) for x in (-0.95, -0.5, 0.5, 0.95)])
        points = self.body.joints["head"] + np.concatenate([crown, tips]) @ rotation.T
        return self._solid(self.camera.project(points)[:, :2], self.outfit.hair)

    def _ears(self, near: bool) -> list[tuple[np.ndarray, Colour, bool]]:
        """The ears in front of the head's middle plane, or those behind it."""
        size = 0.26 * self.body.proportions.head[1] * self.camera.scale
        middle = self.at["head"][2]
        found = [self.at[f"{side}_ear"] for side, _ in SIDES if (self.at[f"{side}_ear"][2] > middle) == near]
        return [(hull(ear[:2] + size * _CIRCLE * (0.7, 1.0)), shade(self.outfit.skin, 0.8), True) for ear in found]

    def _face(self) -> list[tuple[np.ndarray, Colour, bool]]:
        """Eyes, brows, nose and mouth, each only where it looks towards the viewer."""
        rotation, radii = self.body.frames["head"], np.array(self.body.proportions.head)
        dark = shade(self.outfit.skin, 0.35)
        white = (235.0, 235.0, 235.0)
        marks = [((0.0, -0.12, 0.98), (0.17, 0.26), shade(self.outfit.skin, 0.68))]
        marks += [((0.0, -0.48, 0.84), (0.34, 0.09), (60.0, 50.0, 140.0))]
        for _, sign in SIDES:
            marks += [((sign * 0.42, 0.16, 0.88), (0.24, 0.15), white), ((sign * 0.42, 0.16, 0.9), (0.12, 0.14), dark)]
            marks += [((sign * 0.42, 0.40, 0.82), (0.27, 0.06), dark)]
        shapes = []
        for place, size, colour in marks:
            normal = np.array(place) / np.linalg.norm(place)
            if normal @ rotation[2] > 0.15:
                disc = np.stack([_CIRCLE[:, 0] * size[0], _CIRCLE[:, 1] * size[1], np.zeros(16)], 1) + place
                points = self.camera.project(self.body.joints["head"] + (disc * radii) @ rotation.T)[:, :2]
                shapes.append((hull(points), colour, False))
        return shapes


def _between(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Middle of two rings, towards which a band is drawn in so that it stays inside the cloth."""
    return 0.5 * (pair[0].mean(0) + pair[1].mean(0))

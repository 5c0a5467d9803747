"""Bodies of synthetic people: proportions, plausible poses, and the joints that follow from both.

Lengths are in units of the adult's stature. The viewer's frame is x to the right of the image, y up and z towards the
viewer. A person's own frame is x to the person's left, y up and z forward, so the two agree for somebody who faces the
viewer: the person's left is then on the right of the image, as it is in photographs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

JOINTS = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
    *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle"),
    *("right_ankle", "head_top", "neck", "upper_neck", "thorax", "pelvis"),
)
"""All that is known about a person. Each dataset's skeleton is a selection of these."""

SIDES = (("left", 1.0), ("right", -1.0))
FACE_NORMALS: Mapping[str, tuple[float, float, float]] = {
    "nose": (0.0, 0.0, 1.0),
    "left_eye": (0.35, 0.0, 0.93),
    "right_eye": (-0.35, 0.0, 0.93),
    "left_ear": (1.0, 0.0, -0.05),
    "right_ear": (-1.0, 0.0, -0.05),
}
"""Which way each point of the face looks in the head's frame: it can't be seen from behind."""


@dataclass(frozen=True, slots=True)
class Proportions:
    """Half widths, lengths and radii of one body."""

    head: tuple[float, float, float]
    neck: float
    torso: float
    shoulder: float
    hip: float
    upper_arm: float
    forearm: float
    thigh: float
    shin: float
    foot: float
    girth: float
    """Thickness of everything, 1 for the average."""
    size: float
    """Stature against an adult's."""


@dataclass(frozen=True, slots=True)
class Pose:
    """Joint angles in degrees, by name, and where the person is turned to."""

    family: str
    yaw: float
    """0 faces the viewer, 180 turns the back."""
    angles: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Body:
    """An articulated person in the viewer's frame, the pelvis at the origin."""

    proportions: Proportions
    joints: Mapping[str, np.ndarray]
    """Name to (3,): `JOINTS`, and what only drawing needs (waist, head, hands, heels, toes)."""
    frames: Mapping[str, np.ndarray]
    """(3, 3) rotations from a part's own frame to the viewer's: pelvis, chest, head."""


_COMMON = {
    "bend": (-4, 10),
    "side": (-8, 8),
    "twist": (-18, 18),
    "nod": (-12, 22),
    "turn": (-35, 35),
    "cock": (-10, 10),
    "arm_flex": (-15, 30),
    "arm_out": (4, 22),
    "arm_twist": (-25, 50),
    "elbow": (5, 50),
    "leg_flex": (-8, 14),
    "leg_out": (0, 14),
    "leg_twist": (0, 22),
    "knee": (0, 15),
    "tilt": (-4, 6),
    "roll": (-6, 6),
    "stride": (0, 0),
    "swing": (0, 0),
}
_FAMILIES: Mapping[str, tuple[float, Mapping[str, tuple[float, float]]]] = {
    "standing": (0.20, {}),
    "gesturing": (0.20, {"arm_flex": (-20, 110), "arm_out": (5, 95), "arm_twist": (-40, 80), "elbow": (5, 130)}),
    "walking": (0.16, {"stride": (12, 32), "swing": (10, 40), "knee": (4, 35), "elbow": (10, 70)}),
    "running": (0.08, {"stride": (28, 55), "swing": (25, 60), "knee": (15, 95), "elbow": (60, 115), "bend": (4, 25)}),
    "arms_up": (0.11, {"arm_flex": (-10, 40), "arm_out": (85, 175), "elbow": (0, 100), "arm_twist": (-40, 90)}),
    "sitting": (0.10, {"leg_flex": (65, 105), "leg_out": (2, 30), "knee": (60, 110), "arm_flex": (0, 60)}),
    "bending": (0.06, {"bend": (35, 85), "leg_flex": (10, 45), "knee": (5, 45), "arm_flex": (20, 100)}),
    "crouching": (0.04, {"leg_flex": (85, 125), "knee": (95, 140), "bend": (10, 40), "arm_flex": (10, 90)}),
    "lying": (0.05, {"roll": (65, 115), "leg_flex": (-5, 60), "knee": (0, 80), "arm_out": (5, 150)}),
}
"""Share of each family, and the ranges in which it differs from relaxed standing."""
_PLAIN = ("standing", "gesturing")
_PER_SIDE = ("arm_flex", "arm_out", "arm_twist", "elbow", "leg_flex", "leg_out", "leg_twist", "knee")


def sample_proportions(rng: np.random.Generator) -> Proportions:
    """A body between slim and stout, adult or child."""
    child = rng.random() < 0.15
    size = rng.uniform(0.6, 0.85) if child else rng.uniform(0.93, 1.06)
    vary = np.clip(rng.normal(1.0, 0.05, 10), 0.86, 1.14)
    limb = 0.94 if child else 1.0
    head = (1.3 if child else 1.12) * vary[0]
    return Proportions(
        head=(0.052 * head * size, 0.074 * head * size, 0.060 * head * size),
        neck=0.052 * vary[1] * size,
        torso=0.280 * vary[2] * size,
        shoulder=0.112 * vary[3] * size,
        hip=0.058 * vary[4] * size,
        upper_arm=0.172 * vary[5] * limb * size,
        forearm=0.148 * vary[6] * limb * size,
        thigh=0.245 * vary[7] * limb * size,
        shin=0.240 * vary[8] * limb * size,
        foot=0.105 * vary[9] * size,
        girth=float(rng.uniform(0.95, 1.45)) * size,
        size=float(size),
    )


def sample_pose(rng: np.random.Generator, variety: float) -> Pose:
    """A pose of a random family. With `variety` 0 all stand or gesture and face the viewer, with 1 few do."""
    names = list(_FAMILIES)
    shares = np.array([_FAMILIES[name][0] * (2 * variety if name not in _PLAIN else 1.0) for name in names])
    family = names[int(rng.choice(len(names), p=shares / shares.sum()))]
    ranges = {**_COMMON, **_FAMILIES[family][1]}
    draw = {name: float(rng.uniform(*ranges[name])) for name in ranges}
    angles = {name: draw[name] for name in ranges if name not in _PER_SIDE}
    mirrored = rng.random() < 0.35
    first, _ = SIDES if rng.random() < 0.5 else SIDES[::-1]
    for name in _PER_SIDE:
        for side, sign in SIDES:
            alike = mirrored or side == first[0]
            value = draw[name] + float(rng.normal(0, 4)) if alike else float(rng.uniform(*ranges[name]))
            phase = {"leg_flex": draw["stride"], "arm_flex": -draw["swing"]}.get(name, 0.0)
            angles[f"{side}_{name}"] = value + sign * phase * (1.0 if first[0] == "left" else -1.0)
        for side, _ in SIDES if name in ("elbow", "knee") else ():
            angles[f"{side}_{name}"] = max(angles[f"{side}_{name}"], 0.0)
    if family == "lying" and rng.random() < 0.5:
        angles["roll"] = -angles["roll"]
    facing = rng.choice(3, p=(1 - 0.9 * variety, 0.35 * variety, 0.55 * variety))
    yaw = float((rng.normal(0, 22), rng.normal(180, 25), rng.uniform(-180, 180))[facing])
    return Pose(family, yaw, angles)


def articulate(proportions: Proportions, pose: Pose, pitch: float = 0.0) -> Body:
    """Forward kinematics. `pitch` in degrees looks down on the person when positive."""
    p, angle = proportions, pose.angles
    lean = _rx(angle["tilt"])
    pelvis = _rz(angle["roll"]) @ _rx(pitch) @ _ry(pose.yaw) @ lean
    middle = pelvis @ _rx(angle["bend"] * 0.6) @ _rz(angle["side"] * 0.5) @ _ry(angle["twist"] * 0.5)
    chest = middle @ _rx(angle["bend"] * 0.4) @ _rz(angle["side"] * 0.5) @ _ry(angle["twist"] * 0.5)
    head = chest @ _ry(angle["turn"]) @ _rx(angle["nod"] - 0.35 * angle["bend"]) @ _rz(angle["cock"])
    joints: dict[str, np.ndarray] = {"pelvis": np.zeros(3)}
    joints["waist"] = middle @ (0.0, 0.42 * p.torso, 0.0)
    joints["thorax"] = joints["waist"] + chest @ (0.0, 0.58 * p.torso, 0.0)
    joints["upper_neck"] = joints["thorax"] + (chest + head) @ (0.0, 0.5 * p.neck, 0.006)
    joints["neck"] = 0.5 * (joints["thorax"] + joints["upper_neck"])
    joints["head"] = joints["upper_neck"] + head @ (0.0, 0.82 * p.head[1], 0.18 * p.head[2])
    joints["head_top"] = joints["head"] + head @ (0.0, p.head[1], 0.0)
    joints["nose"] = joints["head"] + head @ (0.0, -0.12 * p.head[1], 1.08 * p.head[2])
    for side, sign in SIDES:
        joints[f"{side}_eye"] = joints["head"] + head @ (sign * 0.42 * p.head[0], 0.16 * p.head[1], 0.88 * p.head[2])
        joints[f"{side}_ear"] = joints["head"] + head @ (sign * 1.02 * p.head[0], 0.02 * p.head[1], -0.08 * p.head[2])
        _limbs(joints, p, angle, side, sign, pelvis, chest)
    return Body(p, joints, {"pelvis": pelvis, "chest": chest, "head": head})


def _limbs(
    joints: dict[str, np.ndarray],
    p: Proportions,
    angle: Mapping[str, float],
    side: str,
    sign: float,
    pelvis: np.ndarray,
    chest: np.ndarray,
) -> None:
    """Adds one arm and one leg. Positive angles flex forward, spread outward, twist arms in and legs out."""
    shoulder = joints["thorax"] + chest @ (sign * p.shoulder, -0.10 * p.shoulder, 0.0)
    arm = chest @ _rz(sign * angle[f"{side}_arm_out"]) @ _rx(-angle[f"{side}_arm_flex"])
    arm = arm @ _ry(-sign * angle[f"{side}_arm_twist"])
    forearm = arm @ _rx(-angle[f"{side}_elbow"])
    hip = pelvis @ (sign * p.hip, -0.02 * p.size, 0.0)
    leg = pelvis @ _rz(sign * angle[f"{side}_leg_out"]) @ _ry(sign * angle[f"{side}_leg_twist"])
    leg = leg @ _rx(-angle[f"{side}_leg_flex"])
    shin = leg @ _rx(angle[f"{side}_knee"])
    joints[f"{side}_shoulder"] = shoulder
    joints[f"{side}_elbow"] = shoulder - p.upper_arm * arm[:, 1]
    joints[f"{side}_wrist"] = joints[f"{side}_elbow"] - p.forearm * forearm[:, 1]
    joints[f"{side}_hand"] = joints[f"{side}_wrist"] - 0.055 * p.size * forearm[:, 1]
    joints[f"{side}_hip"] = hip
    joints[f"{side}_knee"] = hip - p.thigh * leg[:, 1]
    ankle = joints[f"{side}_ankle"] = joints[f"{side}_knee"] - p.shin * shin[:, 1]
    joints[f"{side}_heel"] = ankle + shin @ (0.0, -0.022 * p.size, -0.12 * p.foot)
    joints[f"{side}_toe"] = ankle + shin @ (0.0, -0.030 * p.size, 0.88 * p.foot)


def _rx(degrees: float) -> np.ndarray:
    """Turns forward (z) down (-y)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def _ry(degrees: float) -> np.ndarray:
    """Turns forward (z) to the left (x)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def _rz(degrees: float) -> np.ndarray:
    """Turns left (x) up (y)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])

"""A made-up person detector, so that rescoring and OKS-NMS have something to do."""

import numpy as np

from pipeline.data.synthetic.scene import Person, Scene

Box = tuple[float, float, float, float]


def detect(rng: np.random.Generator, scene: Scene) -> list[tuple[Box, float]]:
    """Boxes (x, y, width, height in image pixels) and scores, best first, for one image.

    Finds most people with a jittered box whose score falls with its error and with how much of the person is hidden,
    one in eight a second time at a slight shift, some bystanders, and now and then something that is nobody.
    """
    height, width = scene.image.shape[:2]
    found: list[tuple[Box, float]] = []
    for person in scene.people:
        if rng.random() > (0.96 if person.exposed > 0.4 else 0.75):
            continue
        box = _jitter(rng, person.box, float(rng.gamma(2.0, 0.018)), (width, height))
        score = _score(rng, person, box)
        found.append((box, score))
        if rng.random() < 0.12:
            again = _jitter(rng, box, 0.06, (width, height))
            found.append((again, score * float(rng.uniform(0.25, 0.8))))
    for person in scene.bystanders:
        if rng.random() < 0.6:
            found.append((_jitter(rng, person.box, 0.05, (width, height)), float(rng.uniform(0.1, 0.7))))
    for _ in range(int(rng.poisson(0.5))):
        side = np.array((rng.uniform(15, 70), rng.uniform(30, 120)))
        side = np.minimum(side, (width - 2, height - 2))
        corner = rng.uniform(0, 1, 2) * ((width, height) - side)
        found.append(((*corner.tolist(), *side.tolist()), float(rng.beta(1.2, 6.0))))
    return sorted(found, key=lambda item: -item[1])


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two x, y, width, height boxes."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(w, 0.0) * max(h, 0.0)
    return common / max(a[2] * a[3] + b[2] * b[3] - common, 1e-9)


def _jitter(rng: np.random.Generator, box: Box, spread: float, size: tuple[int, int]) -> Box:
    """Moves each side by a normal error of `spread` box lengths, within the image."""
    error = rng.normal(0, spread, 4)
    x1, y1 = max(box[0] + error[0] * box[2], 0.0), max(box[1] + error[1] * box[3], 0.0)
    x2 = min(box[0] + (1 + error[2]) * box[2], float(size[0]))
    y2 = min(box[1] + (1 + error[3]) * box[3], float(size[1]))
    return (x1, y1, x2 - x1, y2 - y1) if x2 - x1 > 2 and y2 - y1 > 2 else box


def _score(rng: np.random.Generator, person: Person, box: Box) -> float:
    quality = 1.0 - 1.1 * (1.0 - iou(person.box, box)) - 0.45 * (1.0 - person.exposed) + rng.normal(0, 0.05)
    return float(np.clip(quality, 0.05, 0.9995))

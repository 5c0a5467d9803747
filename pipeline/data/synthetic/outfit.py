"""What synthetic people wear."""

import colorsys
from dataclasses import dataclass

import numpy as np

Colour = tuple[float, float, float]
"""Blue, green, red in 0 to 255."""

_SKIN = ((200, 215, 240), (165, 190, 232), (130, 165, 215), (95, 130, 185), (65, 95, 145), (45, 65, 100))
_HAIR = ((25, 25, 30), (30, 45, 70), (45, 75, 110), (90, 150, 190), (150, 155, 160), (35, 50, 130))


@dataclass(frozen=True, slots=True)
class Outfit:
    """Colours and cuts of one person's clothes, skin and hair."""

    skin: Colour
    hair: Colour
    shirt: Colour
    trousers: Colour
    shoes: Colour
    accent: Colour
    sleeve: int
    """0 bare arms, 1 upper arms, 2 to the wrists."""
    legs: int
    """0 shorts, 1 trousers, 2 a skirt."""
    hair_cut: int
    """0 bald, 1 short, 2 long, 3 a hat."""
    accent_side: str
    """Side whose sleeve and trouser leg are striped; empty for none."""
    striped: bool
    yoke: bool


def sample_outfit(rng: np.random.Generator) -> Outfit:
    """Random clothes; shirt and trousers may be of any colour, skin and hair of natural ones."""

    def cloth() -> Colour:
        red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.beta(1.3, 1.3), rng.uniform(0.2, 0.95))
        return (blue * 255, green * 255, red * 255)

    def natural(palette: tuple[tuple[int, int, int], ...]) -> Colour:
        blue, green, red = np.array(palette[int(rng.integers(len(palette)))]) * rng.uniform(0.85, 1.1)
        return (float(blue), float(green), float(red))

    return Outfit(
        skin=natural(_SKIN),
        hair=natural(_HAIR),
        shirt=cloth(),
        trousers=cloth(),
        shoes=cloth(),
        accent=cloth(),
        sleeve=int(rng.choice(3, p=(0.2, 0.45, 0.35))),
        legs=int(rng.choice(3, p=(0.25, 0.6, 0.15))),
        hair_cut=int(rng.choice(4, p=(0.08, 0.5, 0.27, 0.15))),
        accent_side=str(rng.choice(("left", "right", ""), p=(0.3, 0.3, 0.4))),
        striped=bool(rng.random() < 0.25),
        yoke=bool(rng.random() < 0.8),
    )


def shade(colour: Colour, factor: float) -> Colour:
    """A darker (below 1) or lighter colour."""
    return (min(colour[0] * factor, 255.0), min(colour[1] * factor, 255.0), min(colour[2] * factor, 255.0))

"""What the synthetic datasets hold."""

from pydantic import Field, model_validator

from pipeline.strict import Strict


class SyntheticConfig(Strict):
    """How many synthetic people to paint, and how hard to make it. A count of 0 leaves that split out."""

    coco_train: int = Field(2400, ge=0)
    """People with keypoints in COCO's training split; small bystanders and crowds come on top."""
    coco_val: int = Field(400, ge=0)
    """People with keypoints in COCO's validation split."""
    aic_train: int = Field(1200, ge=0)
    """People in AI Challenger's training split."""
    aic_val: int = Field(150, ge=0)
    """People in AI Challenger's validation split."""
    mpii_train: int = Field(800, ge=0)
    """People in MPII's training split."""
    mpii_val: int = Field(150, ge=0)
    """People in MPII's validation split."""
    image_size: tuple[int, int] = (128, 200)
    """Smallest and largest width and height of an image, in pixels."""
    person_height: tuple[float, float] = (80.0, 170.0)
    """Smallest and largest height of a standing adult, in pixels; nobody is made taller than the image."""
    crowding: tuple[int, int] = (4, 2)
    """Most people in one image: COCO and AI Challenger, MPII."""
    variety: float = Field(0.3, ge=0, le=1)
    """How much poses, views and backgrounds vary: at 0 people stand and face the viewer before calm backgrounds."""
    obstacles: float = Field(0.3, ge=0, le=1)
    """Share of images with things in front of the people."""
    truncation: float = Field(0.15, ge=0, le=1)
    """Share of people that may be cut off by the image's border."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> "SyntheticConfig":
        for name, floor in (("image_size", 32), ("person_height", 20)):
            low, high = getattr(self, name)
            if not floor <= low <= high:
                raise ValueError(f"{name} is ({low}, {high}); give two numbers, the smaller first, at least {floor}")
        if min(self.crowding) < 1:
            raise ValueError(f"crowding is {self.crowding}; at least one person fits in an image")
        return self

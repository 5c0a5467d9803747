"""The COCO format: an object with `images`, `annotations` and, mostly, `categories`.

Every record is checked; what is suspicious becomes a `Problem`. The numbers of all annotations are checked at once as
arrays, so that 250 000 of them take seconds.
"""

from typing import Any

import numpy as np

from pipeline.data.definitions import DatasetDefinition
from pipeline.data.instance import Instance
from pipeline.data.readers import files
from pipeline.data.readers.records import LARGEST, ImageRecord, Parsed, is_id, is_number, named, number_rows, shown
from pipeline.data.readers.truth import ground_truth
from pipeline.errors import DataError

TOLERANCE = 1.0
"""Pixels by which boxes and keypoints may leave the image unreported: annotations round, and some count from 1."""


def read_coco(data: Any, definition: DatasetDefinition, file: str, folder: str) -> Parsed:
    """Reads COCO-style content.

    An instance is used if mmpose uses it (its TopDownCocoDataset): no crowd, at least one labelled keypoint (unless the
    format has none), positive area (where it is given), and a box with positive sides after `clip_boxes`. A box that
    lies wholly outside its image is dropped, too. The ground truth in `coco` holds every well-formed annotation of a
    person, as one category.

    Raises DataError if the content as a whole has another form.
    """
    _check_form(data, file)
    parsed = Parsed(file, records=len(data["annotations"]))
    read_images(data["images"], folder, parsed)
    people = _person_categories(data.get("categories"))
    records = _well_typed(data["annotations"], people, definition, parsed)
    boxes, boxes_typed = number_rows([record["bbox"] for record in records], 4)
    width = 3 * definition.num_keypoints
    points, points_typed = number_rows([_points(record, definition) for record in records], width)
    typed = boxes_typed & points_typed
    for index in np.flatnonzero(~typed):
        field = _wrong_points(records[index], definition) if boxes_typed[index] else "bbox"
        what = f"{field}: expected numbers, found {shown(records[index][field])}"
        parsed.note(_name(records[index]), "mistyped record", what, dropped=True)
    kept = np.flatnonzero(typed)
    points = points[kept].reshape(len(kept), definition.num_keypoints, 3)
    if definition.parts:  # confidences rather than COCO's 1 and 2
        points[:, :, 2] = np.where(np.isfinite(points[:, :, 2]) & (points[:, :, 2] > 0), 2, points[:, :, 2])
    with np.errstate(invalid="ignore", over="ignore"):  # infinite sides are found out below
        _collect([records[index] for index in kept], boxes[kept], points, definition, parsed)
    return parsed


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) of x, y, width, height within images of `sizes` (N, 2) of width, height (inf where unknown).

    x1 = max(0, x), x2 = min(W - 1, x1 + max(0, w - 1)), and the width is x2 - x1; likewise for y. So a box inside its
    image loses one pixel of its width. mmpose's `valid bbox` rule, which all published top-down results used.
    """
    start = np.maximum(0, boxes[:, :2])
    end = np.minimum(sizes - 1, start + np.maximum(0, boxes[:, 2:] - 1))
    return np.concatenate([start, end - start], axis=1)


def read_images(records: list[Any], folder: str, parsed: Parsed) -> None:
    """Adds the image records of a COCO file to `parsed`."""
    for position, record in enumerate(records):
        if not isinstance(record, dict) or not is_id(record.get("id")) or not isinstance(record.get("file_name"), str):
            what = f"expected an object with id and file_name, found {shown(record)}"
            parsed.note(f"images[{position}]", "mistyped record", what, dropped=True)
            continue
        image_id, name = record["id"], record["file_name"]
        where = f"image {named(image_id)}"
        if image_id in parsed.images:
            what = f"id of {parsed.images[image_id].file_name} and of {named(name)}; the first is kept"
            parsed.note(where, "duplicate image id", what, dropped=True)
            continue
        if not files.stays_below(name):
            parsed.note(where, "image outside its folder", f"file_name {shown(name)}: not looked at", dropped=True)
            continue
        size = [record.get("width"), record.get("height")]
        if not all(is_number(side) and isinstance(side, int) and 0 < side <= LARGEST for side in size):
            if size != [None, None]:
                what = f"width {shown(size[0])}, height {shown(size[1])}: taken as unknown"
                parsed.note(where, "image size not positive", what, dropped=False)
            size = [None, None]
        crowd = record.get("crowdIndex")
        crowd = float(crowd) if is_number(crowd) and np.isfinite(crowd) else None
        parsed.images[image_id] = ImageRecord(image_id, name, files.join(folder, name), *size, crowd)


def _check_form(data: Any, file: str) -> None:
    if not isinstance(data, dict):
        raise DataError(f"{file}: expected an object with 'images' and 'annotations', found a {type(data).__name__}")
    for field in ("images", "annotations"):
        if not isinstance(data.get(field), list):
            found = (
                f"a {type(data[field]).__name__}" if field in data else f"only {', '.join(sorted(data)) or 'nothing'}"
            )
            raise DataError(f"{file}: expected a list {field!r}, found {found}")
        if not data[field]:
            raise DataError(f"{file}: the list {field!r} is empty")


def _person_categories(categories: Any) -> set[Any] | None:
    """Ids of the categories called person; None, for all, where none is called so."""
    known = [category for category in categories if isinstance(category, dict)] if isinstance(categories, list) else []
    return {item["id"] for item in known if item.get("name") == "person" and is_id(item.get("id"))} or None


def _name(record: dict[str, Any]) -> str:
    return f"annotation {named(record['id'])} (image {named(record['image_id'])})"


def _well_typed(
    annotations: list[Any], people: set[Any] | None, definition: DatasetDefinition, parsed: Parsed
) -> list[dict[str, Any]]:
    """The annotations of people whose fields have the right types; what is in their lists is not looked at."""
    records, seen = [], set()
    for position, record in enumerate(annotations):
        category = record.get("category_id") if isinstance(record, dict) else None
        if people and is_id(category) and category not in people:
            continue
        fault = _fault(record, parsed, seen, definition)
        if fault is None:
            seen.add(record["id"])
            records.append(record)
        else:
            known = isinstance(record, dict) and is_id(record.get("id")) and is_id(record.get("image_id"))
            parsed.note(_name(record) if known else f"annotations[{position}]", *fault, dropped=True)
    return records


def _fault(record: Any, parsed: Parsed, seen: set[Any], definition: DatasetDefinition) -> tuple[str, str] | None:
    """Kind and description of what is wrong with a record's structure."""
    if not isinstance(record, dict):
        return "mistyped record", f"expected an object, found {shown(record)}"
    for field in ("id", "image_id"):
        if not is_id(record.get(field)):
            return "mistyped record", f"{field}: expected a number or a string, found {shown(record.get(field))}"
    if record["id"] in seen:
        return "duplicate annotation id", "another annotation before it has this id; the first is kept"
    if record["image_id"] not in parsed.images:
        return "unknown image", f"image_id {shown(record['image_id'])} is not among the images"
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        return "mistyped record", f"bbox: expected a list of x, y, width, height, found {shown(box)}"
    if definition.keypoints:
        for field, count in definition.fields:
            points = record.get(field)
            if not isinstance(points, list):
                return "mistyped record", f"{field}: expected a list, found {shown(points)}"
            if len(points) != 3 * count:
                expected = f"{3 * count} ({count} keypoints of x, y, v)"
                return "wrong keypoint count", f"{field}: expected {expected} numbers, found {len(points)}"
    for field in ("area", "iscrowd", "num_keypoints"):
        if record.get(field) is not None and not isinstance(record[field], bool) and not is_number(record[field]):
            return "mistyped record", f"{field}: expected a number, found {shown(record[field])}"
    if record.get("category_id") is not None and not is_id(record["category_id"]):
        return "mistyped record", f"category_id: expected a number or a string, found {shown(record['category_id'])}"
    if definition.average_over_categories and record.get("category_id") is None:
        return "mistyped record", "category_id: none, and the metric is by category"
    return None


def _points(record: dict[str, Any], definition: DatasetDefinition) -> list[Any]:
    """The numbers of all keypoints of a well-typed record."""
    if not definition.keypoints:
        return []
    return [number for field, _ in definition.fields for number in record[field]]


def _wrong_points(record: dict[str, Any], definition: DatasetDefinition) -> str:
    """The first field of keypoints that are not all numbers."""
    return next(field for field, count in definition.fields if not number_rows([record[field]], 3 * count)[1][0])


def _collect(
    records: list[dict[str, Any]], boxes: np.ndarray, points: np.ndarray, definition: DatasetDefinition, parsed: Parsed
) -> None:
    """Checks the numbers, then makes the instances and the ground truth."""
    sizes = np.array([_size(parsed.images[record["image_id"]]) for record in records]).reshape(-1, 2)
    given = np.array([record.get("area") for record in records], dtype=np.float64)
    areas = np.where([record.get("area") is None for record in records], boxes[:, 2] * boxes[:, 3], given)
    clean = (np.abs(points) <= LARGEST).all(axis=(1, 2))  # NaN is not
    good_box = _check_boxes(records, boxes, areas, sizes, parsed)
    good_points = _check_keypoints(records, points, sizes, parsed)
    labelled = every = (points[:, :, 2] > 0).sum(axis=1)
    if definition.keypoints:
        first = definition.fields[0][1]
        labelled = _check_counts(records, (points[:, :first, 2] > 0).sum(axis=1), good_points, parsed)
    _check_parts(records, points, definition, parsed)
    crowd = np.array([bool(record.get("iscrowd")) for record in records], dtype=bool)
    used = good_box & good_points & ~crowd & (labelled > 0 if definition.keypoints else True)
    _add_instances(records, np.flatnonzero(used), clip_boxes(boxes, sizes), points, areas, definition, parsed)
    sound = np.flatnonzero((np.abs(boxes) <= LARGEST).all(axis=1) & np.isfinite(areas) & good_points)
    counts = every if definition.parts else labelled
    clean &= not definition.parts  # their file has them in several fields
    rows = zip(sound.tolist(), areas[sound].tolist(), counts[sound].tolist(), strict=True)
    truths = [_truth(records[index], area, count, clean[index], points[index]) for index, area, count in rows]
    parsed.coco = ground_truth(truths, parsed.images.values(), definition)


def _add_instances(
    records: list[dict[str, Any]],
    used: np.ndarray,
    boxes: np.ndarray,
    points: np.ndarray,
    areas: np.ndarray,
    definition: DatasetDefinition,
    parsed: Parsed,
) -> None:
    for index, box, area in zip(used.tolist(), boxes[used].tolist(), areas[used].tolist(), strict=True):
        record = records[index]
        image = parsed.images[record["image_id"]]
        size = None if image.width is None or image.height is None else (image.width, image.height)
        category = record.get("category_id")
        place = (definition.name, record["id"], image.id, image.path, size, tuple(box))
        parsed.instances.append(Instance(*place, points[index], area, category=category))


def _truth(record: dict[str, Any], area: float, labelled: int, clean: bool, points: np.ndarray) -> dict[str, Any]:
    """A ground truth annotation; keypoints as in the file, unless some there are not finite."""
    keypoints = record.get("keypoints", []) if clean and len(points) else points.ravel().tolist()
    return {
        "id": record["id"],
        "image_id": record["image_id"],
        "category_id": record.get("category_id"),
        "bbox": record["bbox"],
        "area": area,
        "iscrowd": int(bool(record.get("iscrowd"))),
        "num_keypoints": labelled,
        "keypoints": keypoints,
    }


def _size(image: ImageRecord) -> tuple[float, float]:
    return (np.inf, np.inf) if image.width is None or image.height is None else (image.width, image.height)


def _check_boxes(
    records: list[dict[str, Any]], boxes: np.ndarray, areas: np.ndarray, sizes: np.ndarray, parsed: Parsed
) -> np.ndarray:
    """Reports suspicious boxes; (N,) bool, True where the box and its area can be used."""
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    finite = (np.abs(boxes) <= LARGEST).all(axis=1)
    positive = finite & (boxes[:, 2:] > 0).all(axis=1)
    inside = positive & (end > 0).all(axis=1) & (start < sizes).all(axis=1)
    sized = inside & (clip_boxes(boxes, sizes)[:, 2:] > 0).all(axis=1)
    good = sized & (areas > 0) & np.isfinite(areas)
    beyond = good & ((start < -TOLERANCE) | (end > sizes + TOLERANCE)).any(axis=1)
    checks = [
        ("box not finite", ~finite, True),
        ("box without size", (finite & ~positive) | (inside & ~sized), True),
        ("box outside its image", positive & ~inside, True),
        ("area not positive", sized & ~good, True),
        ("box leaves its image", beyond, False),
    ]
    for kind, mask, dropped in checks:
        for index in np.flatnonzero(mask):
            what = f"bbox {boxes[index].round(2).tolist()}, area {areas[index]:g}, image size {_text(sizes[index])}"
            parsed.note(_name(records[index]), kind, what, dropped)
    return good


def _check_keypoints(
    records: list[dict[str, Any]], points: np.ndarray, sizes: np.ndarray, parsed: Parsed
) -> np.ndarray:
    """Reports suspicious keypoints; (N,) bool, True where they can be used.

    Changes `points`: a labelled keypoint that lies nowhere becomes not labelled, and those not labelled lie at (0, 0).
    """
    flags = points[:, :, 2]
    good = np.isin(flags, (0, 1, 2)).all(axis=1)
    for index in np.flatnonzero(~good):
        wrong = flags[index][~np.isin(flags[index], (0, 1, 2))]
        parsed.note(_name(records[index]), "visibility not 0, 1 or 2", f"found {wrong[0]:g}", dropped=True)
    broken = (flags > 0) & ~(np.abs(points[:, :, :2]) <= LARGEST).all(axis=2)
    for index in np.flatnonzero(good & broken.any(axis=1)):
        what = f"{broken[index].sum()} labelled keypoints are not finite or huge: taken as not labelled"
        parsed.note(_name(records[index]), "keypoint not finite", what, dropped=False)
    points[broken | ~(flags > 0)] = 0
    place = points[:, :, :2]
    limits = sizes[:, None, :]
    outside = (points[:, :, 2] > 0) & ((place < -TOLERANCE) | (place > limits - 1 + TOLERANCE)).any(axis=2)
    for index in np.flatnonzero(good & outside.any(axis=1)):
        first = place[index][outside[index]][0].round(2).tolist()
        what = f"{outside[index].sum()} keypoints, such as {first}, image size {_text(sizes[index])}"
        parsed.note(_name(records[index]), "keypoint outside its image", what, dropped=False)
    return good


def _check_counts(records: list[dict[str, Any]], labelled: np.ndarray, good: np.ndarray, parsed: Parsed) -> np.ndarray:
    """Reports wrong num_keypoints; (N,) the numbers that hold.

    They are recounted, but a 0 stands: mmpose and pycocotools leave such people out, and CrowdPose, which does not
    count head and neck, means it.
    """
    counts = labelled.tolist()
    for index, (record, fine) in enumerate(zip(records, good.tolist(), strict=True)):
        given = record.get("num_keypoints")
        if fine and given is not None and given != counts[index]:
            what = f"num_keypoints {shown(given)}, but {counts[index]} are labelled: "
            what += "not used, as in published evaluations" if given == 0 else "recounted"
            parsed.note(_name(record), "num_keypoints inconsistent", what, dropped=given == 0)
            counts[index] = 0 if given == 0 else counts[index]
    return np.array(counts, dtype=np.int64)


def _check_parts(
    records: list[dict[str, Any]], points: np.ndarray, definition: DatasetDefinition, parsed: Parsed
) -> None:
    """Reports parts that are labelled although their annotation says that they can't be."""
    start = 0
    for part in definition.parts:
        labelled = (points[:, start : start + part.count, 2] > 0).sum(axis=1)
        start += part.count
        for record, count in zip(records, labelled.tolist(), strict=True):
            if part.valid is not None and count and not record.get(part.valid, True):
                what = f"{part.valid} is false, but {count} of {part.field} are labelled: used, as in published evaluations"
                parsed.note(_name(record), "invalid part labelled", what, dropped=False)


def _text(size: np.ndarray) -> str:
    return f"{size[0]:g} x {size[1]:g}" if np.isfinite(size).all() else "unknown"

"""YAML from anybody, as plain data: no objects, no key twice, and bounds on what a few bytes may grow to."""

from typing import Any

import yaml

MAX_BYTES = 256 * 1024
"""Of a file; the largest preset has 5 kB."""
MAX_NODES = 20_000
"""Values in a file, those that an alias repeats counted each time. 20,000 are read in two seconds."""
MAX_DEPTH = 50
MAX_SCALAR = 10_000
"""Characters of one value."""


def parse(text: str) -> Any:
    """What a YAML text says. Raises ValueError with one line for anything that is not plain, unambiguous and small."""
    try:
        return _load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself takes the last of two equal keys, and shares what aliases repeat: nine lines
    can then mean a billion values to whoever walks through them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._composed, self._depth = 0, 0

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _size(node, {})
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._composed += 1
        self._depth += 1
        where = self.peek_event().start_mark
        if self._composed > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES} values", problem_mark=where)
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH}", problem_mark=where)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if len(node.value) > MAX_SCALAR:
            raise yaml.MarkedYAMLError(problem=f"longer than {MAX_SCALAR} characters", problem_mark=node.start_mark)
        if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in node.value):
            raise yaml.MarkedYAMLError(problem="a character that no name can have", problem_mark=node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    what = f"the key {key.value[:100]!r} a second time"
                    raise yaml.MarkedYAMLError(problem=what, problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


def _size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Values in a node with every alias written out. Raises YAMLError above the limit, and for a node within itself."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise yaml.MarkedYAMLError(problem="an alias of what it is part of", problem_mark=node.start_mark)
        return size
    known[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = list(node.value)
    size = 1 + sum(_size(child, known) for child in children)
    if size > MAX_NODES:
        raise yaml.MarkedYAMLError(
            problem=f"more than {MAX_NODES} values when its aliases are written out", problem_mark=node.start_mark
        )
    known[id(node)] = size
    return size

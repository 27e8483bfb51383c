"""YAML and JSON texts into plain values, within bounds: a text of a few lines can stand for gigabytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpctl.system.input_files import UnusableFileError

if TYPE_CHECKING:
    import yaml

MAX_DEPTH = 64
"""Mappings and lists within each other, those that an alias brings in included."""
MIN_NODES = 10_000
"""A text may always stand for so many values; a longer one for one a character, which without aliases is plenty."""
_MAX_DIGITS = 40
"""A longer number stays a text: Python takes quadratic time for it, and nothing here counts so far."""


def parse_yaml(text: str) -> object:
    """The tree a YAML or JSON text stands for. Raises UnusableFileError."""
    import yaml  # lazily: 15 ms that an install without a file need not spend

    if text.lstrip().startswith("{") and "\t" in text:
        text = text.replace("\t", " ")  # JSON may be indented with tabs, YAML may not
    try:
        return yaml.load(text, _loader(max(MIN_NODES, len(text))))  # noqa: S506 - a subclass of SafeLoader
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UnusableFileError(
            f"is not YAML: line {line}: the character U+{ord(text[error.position]):04X} is not allowed"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UnusableFileError(f"is not YAML: {where}{said}") from None
    # What PyYAML's constructors raise for a value that is not of the type its tag or form says.
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UnusableFileError(f"is not YAML: a value does not fit its tag or form: {error}") from None


def _loader(max_nodes: int) -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice in a mapping, of which yaml would silently keep the last.

        And texts that stand for more than they have: an alias counts as often as it is used.
        """

        def __init__(self, stream: Any) -> None:
            super().__init__(stream)
            self._measured: dict[int, tuple[int, int]] = {}
            """By node: how many nodes it stands for, and how deep they go."""
            self._depth = 0

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            alias = self.check_event(yaml.AliasEvent)
            line = self.line + 1  # that of the scanner, which may be a little further
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise UnusableFileError(f"line {line}: is nested more than {MAX_DEPTH} levels deep")
            node: yaml.Node | None = super().compose_node(parent, index)
            self._depth -= 1
            if not alias:
                self._measured[id(node)] = self._measure(node, line)
            elif id(node) not in self._measured:
                raise UnusableFileError(f"line {line}: an alias refers to itself")
            return node

        def _measure(self, node: yaml.Node | None, line: int) -> tuple[int, int]:
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
            known = [self._measured[id(part)] for part in parts]
            size, depth = 1 + sum(one for one, _ in known), 1 + max((deep for _, deep in known), default=0)
            if size > max_nodes or depth > MAX_DEPTH:
                raise UnusableFileError(f"line {line}: aliases expand it to too many values ({size})")
            return size, depth

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise UnusableFileError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
                    seen.add(key.value)
            return dict(super().construct_mapping(node, deep=deep))

        def number(self, node: yaml.ScalarNode) -> object:
            """YAML 1.1 takes 53:10 for a number of base 60; here, as for kumactl, it is a text (ports and uid)."""
            is_text = ":" in node.value or len(node.value) > _MAX_DIGITS
            return node.value if is_text else self.construct_yaml_int(node)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.number)
    return Loader

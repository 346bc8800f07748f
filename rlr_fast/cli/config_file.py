"""Flags from a YAML file: ``--config FILE``, where the flags of the command line win."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from cyclopts import Argument, ArgumentCollection, Token

from rlr_fast.config import level_groups, level_name, suggest

_SIDES = ("--tile", "--overlap")


def read_flags(_app: object, _words: object, arguments: ArgumentCollection) -> None:
    """Give flags that the command line does not name the values of the ``--config`` file, if any.

    Raises:
        ValueError: The file is missing or broken, an unknown flag, or a value that does not fit.
    """
    config = arguments.get("--config", None)
    if config is None or not config.tokens:
        return
    path = config.tokens[0].value
    known = {
        name: argument
        for argument in arguments
        for name in argument.names
        if name.startswith("--") and name not in argument.negatives and argument is not config
    }
    seen: set[int] = set()
    for key, (value, text) in _read(path).items():
        name = "--" + key.replace("_", "-")
        if name not in known:
            names = (flag[2:] for flag in known)
            raise ValueError(f"--config: unknown flag {key!r}; {suggest(name[2:], names)}")
        if id(known[name]) in seen:
            raise ValueError(f"--config: {name} stands there twice, under two names")
        seen.add(id(known[name]))
        values = _checked(name, known[name], value, text)
        if not known[name].has_tokens:
            for index, text in enumerate(values):
                token = Token(keyword=name, value=text, source=f"--config {path}", index=index)
                known[name].append(token)


def _read(path: str) -> dict[str, tuple[Any, Any]]:
    """Return the values by name, each as YAML understands it, and as it is written."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"--config: cannot read {path!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config: {path!r} is not UTF-8 text") from error
    except RecursionError:
        raise ValueError(f"--config: {path!r} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        reason = " ".join(str(error).split())
        raise ValueError(f"--config: {path!r} is not YAML: {reason}") from error
    if not isinstance(values or {}, dict):
        raise ValueError(f"--config: {path!r} must hold flags and values, e.g. 'workers: 2'")
    keys = tree.value if isinstance(tree, yaml.MappingNode) else []
    name, count = next(iter(Counter(str(key.value) for key, _ in keys).most_common(1)), ("", 0))
    if count > 1:  # YAML takes the last
        raise ValueError(f"--config: {path!r}: {name!r} stands there twice")
    for name, value in (values or {}).items():
        # Seen before anything writes a value out: aliases make a few lines a billion words.
        if not _is_plain(value, lists=2):
            raise ValueError(f"--config: {str(name)!r} must be a value, or a list of values")
    written = {str(key.value): node for key, node in keys}
    # What a merge key (<<) brings has no node of its own.
    return {
        str(name): (value, _text(written[str(name)]) if str(name) in written else value)
        for name, value in (values or {}).items()
    }


def _text(node: yaml.Node) -> Any:
    """Return a value, or the values of a list, as the file has them."""
    return [_text(n) for n in node.value] if isinstance(node, yaml.SequenceNode) else node.value


def _is_plain(value: Any, lists: int) -> bool:
    """Return whether a value is no mapping or set, and has at most so many lists in each other."""
    if isinstance(value, list):
        return lists > 0 and all(_is_plain(each, lists - 1) for each in value)
    return not isinstance(value, (dict, set, tuple))


def _checked(name: str, argument: Argument, value: Any, text: Any) -> list[str]:
    """Return a file's value as the words that a command line would hold, from how it is written."""
    count, several = argument.token_count()
    if count == 0:
        if not isinstance(value, bool):
            raise ValueError(f"--config: {name} is true or false, got {value!r}")
        return [str(value)]
    if name in _SIDES and isinstance(value, list):  # as config.json has them
        value, text = [value], [text]
    values = value if isinstance(value, list) else [value]
    if not values or None in values or not (several or len(values) == count):
        wanted = (
            "one value or more" if several else "one value" if count == 1 else f"{count} values"
        )
        raise ValueError(f"--config: {name} takes {wanted}, got {value!r}")
    texts = text if isinstance(value, list) else [text]
    return [_word(name, *each) for each in zip(values, texts, strict=True)]


def _word(name: str, value: Any, text: Any) -> str:
    """Return one of a flag's values as the command line has it: a list is 3x5, or 2-5 of levels."""
    if not isinstance(value, list):
        return str(text)
    if name == "--out-indices":
        if not all(type(level) is int for level in value):
            raise ValueError(f"--config: {name}: a mean is of levels, got {value!r}")
        [group] = level_groups([value])
        return level_name(group)
    return "x".join(map(str, text))

"""Command lines and config files, read into plain dicts of sections.

What comes in: `--config=FILE --config.train.batch_size=4 ...`, and a Python, YAML or JSON file.
What goes out: the file's name, and {section: {key: value}} in the types of `config_keys.KEYS`.
Every mistake is one line that names the flag, or the file and its line.
"""

import ast
import difflib
import json
import re
import runpy
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jax_sft.config_keys import KEYS, NAMED_DICTS, Key, checked, expected, shortened, unknown_key

_NONE = ("None", "none", "null")
_FILES = (".py", ".yaml", ".yml", ".json")


def parse_flags(argv: Sequence[str]) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """Reads `--config=FILE` and `--config.section.key=value`, each also as two words.

    Args:
        argv: the words after the command.

    Returns:
        The config file or None, and the overrides as {section: {key: value}}.

    Raises:
        ValueError: an unknown flag, with the nearest known one, or a value of another type.
    """
    file, overrides, words = None, {}, iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        if not name.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}; flags are --config.section.key=value")
        if name != "--config" and not name.startswith("--config."):
            raise ValueError(f"unknown flag {name}; did you mean {_nearest_flag(name)}?")
        if name != "--config":
            _check_path(name)
        if not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise ValueError(f"{name} has no value; give it as {name}=value")
        if name != "--config":
            _override(overrides, name.split(".")[1:], text)
        elif file is not None:
            raise ValueError(f"--config is given twice, as {file} and {text}; give one file")
        else:
            file = text
    return file, overrides


def _nearest_flag(name: str) -> str:
    flags = ["--config"] + [
        f"--config.{section}.{key}" for section in KEYS for key in KEYS[section]
    ]
    leaf = name.rpartition(".")[2].lstrip("-")
    ends = [flag for flag in flags if flag.endswith(f".{leaf}")]
    return (ends or difflib.get_close_matches(name, flags, 1, cutoff=0.0))[0]


def _check_path(name: str) -> None:
    section, *rest = name.split(".")[1:]
    if section not in KEYS:
        path = ".".join([section, *rest])
        raise unknown_key(path, () if rest else KEYS, flag="--config.")
    if not rest:
        raise ValueError(
            f"{name} is a section; set a key of it, as {name}.{next(iter(KEYS[section]))}"
        )
    if rest[0] not in KEYS[section]:
        raise unknown_key(f"{section}.{rest[0]}", KEYS[section], flag="--config.")
    if rest[1:] and KEYS[section][rest[0]].kind != "dict":
        raise ValueError(f"unknown flag {name}; did you mean --config.{section}.{rest[0]}?")


def _override(overrides: dict[str, Any], path: list[str], text: str) -> None:
    """Puts one flag's value into the overrides; a free-form dict's entries accumulate."""
    section, key, *names = path
    at, spec = f"{section}.{key}", KEYS[section][key]
    value = _literal(text) if names else checked(at, spec, _from_text(spec, text))
    for name in reversed(names):
        value = {name: value}
    keys = overrides.setdefault(section, {})
    if isinstance(value, dict) and isinstance(keys.get(key), dict):
        _merge(keys[key], value)
    else:
        keys[key] = value


def _merge(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            _merge(target[name], value)
        else:
            target[name] = value


def _from_text(key: Key, text: str) -> Any:
    """A flag's text as the key's type; a text that does not fit is left for the check to name."""
    for choice in key.choices:
        if text == choice or (not isinstance(choice, str) and text.lower() == str(choice).lower()):
            return choice
    if key.default is None and text in _NONE:
        return None
    if key.kind == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    if key.kind in ("int", "float"):
        return _number(text)
    if key.kind == "strings" and text[:1] not in ("[", "("):
        return tuple(text.split(",")) if text else ()
    is_text = key.kind in ("str", "choice")
    if key.kind in ("prompts", "mixture", "sources"):
        is_text = text[:1] not in ("[", "{", "(")
    return text if is_text else _literal(text)


def _number(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _literal(text: str) -> Any:
    """A free-form value: Python's or YAML's literal, or the text itself."""
    if text in _NONE:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core scalars, so that 1e-4 is a number and `no` a string; no repeated keys."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                message = "a key is a list or a dict, and not a name"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            if key.value in seen:
                message = f"key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern in (
    ("null", r"~|null|Null|NULL|None|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?[0-9]+"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.nan"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None
    )


def read_config_file(file: str) -> Any:
    """What a config file holds.

    Args:
        file: a .py file with get_config(), or a .yaml, .yml or .json file.

    Returns:
        What get_config() returned, or the file's {section: {key: value}}.

    Raises:
        ValueError: no such file, or a mistake in it, with its line.
    """
    path = Path(file)
    if path.suffix not in _FILES:
        raise ValueError(f"--config is {file!r}; expected a file that ends in {', '.join(_FILES)}")
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*") if p.suffix in _FILES]
        near = difflib.get_close_matches(file, beside, 1)
        hint = f"; did you mean {near[0]}?" if near else "; give the path of a config file"
        raise ValueError(f"--config file {file} does not exist{hint}")
    if path.suffix == ".py":
        return _run_python(path)
    try:
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        values = _load_json(text) if is_json else yaml.load(text, Loader=_Loader)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} line {error.lineno}: {error.msg}; expected JSON") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{file} line {line}: {error.problem}; expected YAML") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is not text: {_one_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deep; expected sections of keys") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); see to its rights") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {shortened(values)}; expected sections of keys")
    return values


def _load_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            # A json hook is not told where it is; the key's last place is near enough.
            place = max(0, text.rfind(f'"{twice}"'))
            raise json.JSONDecodeError(f"key {twice!r} is given twice", text, place)
        return values

    return json.loads(text, object_pairs_hook=unique)


def _run_python(path: Path) -> Any:
    try:
        get_config = runpy.run_path(str(path), run_name=path.stem).get("get_config")
        if not callable(get_config):
            raise ValueError(
                f"{path} defines no get_config(); expected a function that returns one"
            )
        return get_config()
    except SyntaxError as error:
        raise ValueError(f"{error.filename} line {error.lineno}: {error.msg}") from None
    except Exception as error:  # the file is the user's code: whatever it raises is one line
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        if not lines and isinstance(error, ValueError):  # of this function
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        place = f"{path} line {lines[-1]}" if lines else path
        raise ValueError(f"{place}: {kind}{_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def help_text(command: str = "python -m jax_sft.main") -> str:
    """The usage and every key, with default, meaning, unit and constraint.

    Args:
        command: what stands before the flags.

    Returns:
        Lines of text, as `--help` prints them.
    """
    lines = [
        f"usage: {command} --config=FILE [--config.SECTION.KEY=VALUE ...]",
        "",
        "FILE is a Python file with get_config(), or a YAML or JSON file of sections and keys.",
        "A value: 1e-4, true, None, text; a list: a,b or ['a', 'b']; an entry of a dict:",
        "--config.optimizer.kwargs.lr=1e-4. Each key is shown with its default.",
    ]
    for section, keys in KEYS.items():
        lines += ["", f"{section}:"]
        for name, key in keys.items():
            path = f"{section}.{name}"
            lines.append(f"  --config.{path}={_default(key)}")
            lines.append(f"        {key.help}; {expected(key)}")
            table, taken_by = NAMED_DICTS[path] if path in NAMED_DICTS else ({}, None)
            lines += [
                f"        .{name}: {key.help}; {expected(key)}" for name, key in table.items()
            ]
            for owner, names in (taken_by or {}).items():
                lines.append(f"        {owner} takes: {', '.join(names) or 'no arguments'}")
    return "\n".join(lines)


def _default(key: Key) -> str:
    if isinstance(key.default, str | bool):
        return str(key.default).lower() if isinstance(key.default, bool) else key.default
    return repr(list(key.default) if isinstance(key.default, tuple) else key.default)

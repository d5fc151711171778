"""Configuration: YAML, the command line, values of options."""

import random
from pathlib import Path
from typing import Any

import config
from tools.torture.targets import Target
from tools.torture.targets.mutation import mutated, mutated_text, odd_text, odd_value

_CONFIGS = Path(__file__).resolve().parents[3] / "configs"
_OPTIONS = config.all_options()
_NESTED = "model:\n  name: deit_tiny\noptimizer:\n  type: sgd\n  betas: [0.9, 0.99]\nlr: &lr 1e-3\n"
_ALIASES = "a: &a [1, 2]\nb: &b [*a, *a]\nscale: *b\nx: {<<: {lr: 1}, <<: [{opt: sgd}]}\n"
_SEEDS = [*(p.read_text(encoding="utf-8") for p in sorted(_CONFIGS.glob("*.yaml")))]
_SEEDS += [_NESTED, _ALIASES, "base: a.yaml\nlr: 0.1\n", "? [a, b]\n: c\n? {d: e}\n: |\n  text\n"]
_LINES = [line for text in _SEEDS for line in text.splitlines() if ":" in line]


def _line(rng: random.Random) -> str:
    """An option and a value that it may not take, as YAML."""
    name = rng.choice(_OPTIONS).name if rng.random() < 0.9 else odd_text(rng)
    value = odd_value(rng, 2) if rng.random() < 0.5 else odd_text(rng)
    return f"{name}: {value if rng.random() < 0.7 else ascii(value)}"


def _yaml(rng: random.Random) -> bytes:
    chance = rng.random()
    if chance < 0.15:
        return mutated(rng, [text.encode() for text in _SEEDS])
    if chance < 0.6:
        lines = rng.sample(_LINES, rng.randrange(1, 4)) + [_line(rng)]
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    return mutated_text(rng, _SEEDS).encode("utf-8", "surrogatepass")


def _read_yaml(content: bytes, folder: Path) -> None:
    path = folder / "options.yaml"
    path.write_bytes(content)
    (folder / "a.yaml").write_text("base: options.yaml\n", encoding="utf-8")
    found = config.resolve({"config": str(path)})
    # What was read is written, and read again as the same.
    path.write_text(config.to_yaml(found), encoding="utf-8")
    assert config.resolve({"config": str(path)}).recipe() == found.recipe()


def _words(rng: random.Random) -> list[str]:
    words: list[str] = []
    for _ in range(rng.randrange(1, 4)):
        chance = rng.random()
        name = rng.choice(_OPTIONS).flag if chance < 0.9 else "--" + odd_text(rng)
        name = name.replace("--", "--no-", 1) if chance < 0.05 else name
        values = [odd_text(rng) for _ in range(rng.choice((0, 1, 1, 1, 2, 3)))]
        words += [f"{name}={values[0]}"] if values and chance < 0.3 else [name, *values]
    return words


def _parse(words: list[str], folder: Path) -> None:
    try:
        config.load(words)
    except SystemExit as error:  # --help
        assert not error.code


def _value(rng: random.Random) -> tuple[str, Any]:
    name = rng.choice(_OPTIONS).name
    return name, odd_value(rng, 2) if rng.random() < 0.6 else odd_text(rng)


def _convert(given: tuple[str, Any], folder: Path) -> None:
    name, raw = given
    opt = config.by_name(name)
    value = config.convert(opt, raw)
    assert config.convert(opt, value) == value


TARGETS = (
    Target("config YAML", _yaml, _read_yaml),
    Target("config command line", _words, _parse, share=0.5),
    Target("config values", _value, _convert),
)

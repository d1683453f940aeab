"""`gapo-mega soup`: what its options mean and refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gapo_mega.commands.soup import parse_weights, soup
from tests.helpers.tiny import tiny_llama


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [1 / 3] * 3),
        ("0.2, 0.3,0.5", [0.2, 0.3, 0.5]),
        ("1/3,1/3,1/3", [1 / 3] * 3),
        ("-1,1.5,0.5", [-1.0, 1.5, 0.5]),
        ("0,1,0", [0.0, 1.0, 0.0]),
        ("0.1,0.2,0.7000000000000001", [0.1, 0.2, 0.7000000000000001]),
    ],
)
def test_weights_sum_to_one(text: str | None, expected: list[float]) -> None:
    assert parse_weights(text, 3) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5,0.5", "--weights: found 2 for 3 models, accepted: one for each"),
        ("0.3,0.3,0.3", "--weights: found 0.3,0.3,0.3 with the sum 0.9, accepted: weights with the sum 1"),
        ("0.5,0.5,x", "--weights: found '0.5,0.5,x', accepted: numbers with commas"),
        ("1/0,0,0", "--weights: found '1/0,0,0', accepted: numbers"),
        ("nan,1,0", "--weights: found 'nan,1,0', accepted: numbers"),
        ("inf,1,0", "--weights: found 'inf,1,0', accepted: numbers"),
        ("1e400,1,0", "--weights: found '1e400,1,0', accepted: numbers"),
        ("1,,0", "--weights: found '1,,0', accepted: numbers"),
        ("", "--weights: found '', accepted: numbers"),
    ],
)
def test_other_weights_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_weights(text, 3)
    assert str(error.value).startswith(message)


def test_a_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(tmp_path / name) for name in ("a", "b")]
    for seed, name in enumerate(names):
        tiny_llama(Path(name), vocab=101, seed=seed)
    out = tmp_path / "new" / "soup"
    soup(model=names, out=out, weights="1/4,3/4", dtype="bf16")
    assert capsys.readouterr().out == f"wrote {out}\n"
    one, other, found = (load_file(Path(d) / "model.safetensors") for d in (*names, str(out)))
    for name, value in found.items():  # quarters are exact
        assert torch.equal(value, (0.25 * one[name].double() + 0.75 * other[name].double()).bfloat16())
    assert [path.name for path in out.parent.iterdir()] == ["soup"]

    with pytest.raises(ValueError, match=r"^--out: .*soup exists already; name another directory, or --over"):
        soup(model=names, out=out)
    soup(model=names, out=out, overwrite=True)
    # What is read is not replaced, with --overwrite neither.
    with pytest.raises(ValueError, match=r"^--out: found .*a, which holds .*a, accepted: a directory beside"):
        soup(model=names, out=Path(names[0]), overwrite=True)
    with pytest.raises(ValueError, match=r"^--dtype: found 'fp8', accepted: fp32, bf16, fp16"):
        soup(model=names, out=tmp_path / "other", dtype="fp8")
    with pytest.raises(ValueError, match=r"^--model: found 1, accepted: two or more"):
        soup(model=names[:1], out=tmp_path / "other")
    with pytest.raises(ValueError, match=r"^--model: .*new has no config\.json; accepted"):
        soup(model=[names[0], str(out.parent)], out=tmp_path / "other")
    assert not (tmp_path / "other").exists()

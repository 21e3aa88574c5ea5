"""A model's folder is data: its own code is never run and pickled weights are never read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from actors.render import Renderer
from learner.trainer.model import Policy
from matpo.config import Learner, Model
from matpo.errors import UserError
from matpo.model_files import require_model_files

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "quickstart"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "model"))


def with_code(folder: Path, file: str, classes: Mapping[str, object]) -> Path:
    """Have a settings file of the model name classes of a module beside it; returns what running it leaves behind."""
    trace = folder / "it_ran"
    (folder / "theirs.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Theirs: pass\n")
    settings = json.loads((folder / file).read_text())
    settings |= {"auto_map": dict(classes), "model_type": "theirs"}
    settings.pop("tokenizer_class", None)
    (folder / file).write_text(json.dumps(settings))
    return trace


def test_code_beside_the_weights_is_not_run(folder: Path) -> None:
    trace = with_code(folder, "config.json", {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Theirs"})
    with pytest.raises(UserError, match=r"cannot be loaded: .*; give the folder of a Hugging Face causal model"):
        Policy.load(folder, Learner())
    assert not trace.exists()


def test_code_of_a_tokenizer_is_not_run(folder: Path) -> None:
    trace = with_code(folder, "tokenizer_config.json", {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]})
    Renderer.load(Model(path=folder))
    assert not trace.exists()


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot be loaded: .*safetensors"):
        Policy.load(folder, Learner())


def test_weights_of_another_shape_than_the_config_says_are_refused(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["hidden_size"] *= 2
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"its weights do not fit its config\.json; give a folder where they do"):
        Policy.load(folder, Learner())


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"learner\.device = 'cuda:99': .*; set it to cpu"):
        Policy.load(SHIPPED, Learner(device="cuda:99"))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", b'{"version": ', "tokenizer.json' is not JSON"),
        ("tokenizer.json", b'{"version": "1.0"}', "tokenizer.json' has no 'model'"),
        ("config.json", b"[]", "config.json' has no 'model_type'"),
        ("model.safetensors", b"<html>404</html>", "claims a header of"),
    ],
)
def test_a_damaged_file_is_found_before_anything_starts(folder: Path, file: str, content: bytes, said: str) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=said):
        require_model_files(Model(path=folder))

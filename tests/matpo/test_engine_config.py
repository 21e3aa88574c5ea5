"""Which servers an actor may drive: combinations that make no sense are refused with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from matpo.config import SglangEngine
from matpo.errors import UserError
from matpo.load import load_config

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.toml"
URL = "http://127.0.0.1:3000"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": ("127.0.0.1:3000",)}, "'127.0.0.1:3000' is no http://HOST:PORT"),
        ({"urls": (URL, URL + "/")}, "names a server twice"),
        ({"urls": (URL,), "router": "http://127.0.0.1:4000"}, "exclude each other"),
        (
            {"urls": (URL,), "servers": 2, "arguments": ("--x",)},
            r"\['arguments', 'servers'\] have no effect",
        ),
        ({"router": URL, "gpus": ((0,),)}, r"\['gpus'\] have no effect"),
        ({"gpus": ((0,),), "device": "cpu"}, "no effect with device cpu"),
        ({"gpus": ((0, 1), (2, 3)), "servers": 2}, r"groups of \[2, 2\] GPUs, but there are 2 servers of 1 each"),
        ({"gpus": ((0,),), "servers": 2}, r"groups of \[1\] GPUs, but there are 2 servers of 1 each"),
        ({"gpus": ((0, 1), (1, 2)), "servers": 2, "tensor_parallel": 2}, "names a GPU twice"),
        ({"gpus": ((-1,),)}, "or one below 0"),
    ],
)
def test_servers_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SglangEngine.model_validate(options)


def test_settings_of_servers_survive_being_written_and_read() -> None:
    for options in ({"urls": (URL,)}, {"router": URL}, {"servers": 2, "gpus": ((0,), (3,))}):
        settings = SglangEngine.model_validate(options)
        assert SglangEngine.model_validate_json(settings.model_dump_json()) == settings


def test_several_actors_do_not_share_servers_or_gpus() -> None:
    for engine in ('{kind="sglang"}', f'{{kind="sglang", device="cpu", urls=["{URL}"]}}'):
        with pytest.raises(UserError, match=r"actor\.count = 2, and all of them would use the same servers"):
            load_config(QUICKSTART, [f"actor.engine={engine}", "actor.count=2"])

"""How the SGLang engine drives adapters, against a stub that does what no real server does on demand."""

from __future__ import annotations

from pathlib import Path

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from actors.engines.engine import Generation
from actors.engines.sglang.adapters import served
from actors.engines.sglang.engine import SglangEngine
from actors.engines.sglang.launch import command
from matpo.adapters import TENSOR_FILE, adapter_shapes
from matpo.config import Lora, Sampling
from matpo.config import SglangEngine as Settings
from protocols.weights import Tensor, Weights, read_keyframe
from tests.actors.engines.models import make_model
from tests.actors.engines.stub import Stub

LORA = Lora(rank=2, alpha=4.0, target_modules=("q_proj", "up_proj"))
PROMPT = np.array([40, 41], dtype=np.int32)
HIDDEN, QUERIES, INNER = 32, 64, 64


def adapter() -> Weights:
    layers = [f"model.layers.{index}." for index in range(2)]
    shapes = {f"{layer}self_attn.q_proj.weight": (QUERIES, HIDDEN) for layer in layers}
    shapes |= {f"{layer}mlp.up_proj.weight": (INNER, HIDDEN) for layer in layers}
    return {n: Tensor("float32", np.ones(s, dtype=np.float32)) for n, s in adapter_shapes(shapes, LORA).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model("qwen3", tmp_path / "model")
    return tmp_path / "model"


def settings_for(stub: Stub, **options: object) -> Settings:
    basis = Settings(urls=(stub.url,), device="cpu", dtype="float32", max_context_tokens=32)
    return basis.model_copy(update=options)


def dropped_by(stub: Stub) -> list[str]:
    """Adapters in order; what was under way when the engine left is asked for again."""
    return list(dict.fromkeys(str(body["lora_name"]) for body in stub.asked("/unload_lora_adapter")))


async def test_an_adapter_is_dropped_after_its_last_request_and_its_tokens_keep_its_version(folder: Path) -> None:
    stub, answers = Stub(hold_after=2), list[Generation]()
    with anyio.fail_after(30):
        async with stub.serve():
            settings = settings_for(stub, stream_tokens=1)
            async with SglangEngine.open(folder, settings, lora=LORA, seed=0) as engine:
                await engine.load(adapter(), version=7)

                async def one() -> None:
                    answers.append(await engine.generate(PROMPT, Sampling(max_tokens=5), deadline_s=20))

                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(one)
                    await stub.arrived.wait()
                    report = await engine.load(adapter(), version=8)
                    assert not stub.asked("/unload_lora_adapter")
                    stub.go_on.set()
                answers.append(await engine.generate(PROMPT, Sampling(max_tokens=5), deadline_s=20))
    first, second = (str(body["lora_name"]) for body in stub.asked("/load_lora_adapter"))
    assert dropped_by(stub) == [first, second], "the last one when the engine leaves the server"
    assert [body["lora_path"] for body in stub.asked("/generate")] == [first, second]
    assert [answer.versions.tolist() for answer in answers] == [[7] * 5, [8] * 5]
    assert report.pause_s == 0 and not stub.asked("/pause_generation")


async def test_an_adapter_without_requests_is_dropped_as_soon_as_the_next_is_there(folder: Path) -> None:
    stub = Stub()
    with anyio.fail_after(30):
        async with stub.serve(), SglangEngine.open(folder, settings_for(stub), lora=LORA, seed=0) as engine:
            await engine.load(adapter(), version=0)
            await engine.load(adapter(), version=1)
            while not stub.asked("/unload_lora_adapter"):
                await anyio.lowlevel.checkpoint()
            calls = [path for path, _ in stub.requests if "lora" in path]
    assert calls == ["/load_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"]


async def test_every_role_names_its_own_adapter_and_all_of_a_version_are_dropped_together(folder: Path) -> None:
    stub = Stub(refuses=["/unload_lora_adapter"])  # as if the server had lost them: each is asked for all the same
    lora = LORA.model_copy(update={"roles": {"planner": "shared", "worker": "own", "critic": "frozen"}})
    weights = {**adapter(), **{f"worker/{name}": tensor for name, tensor in adapter().items()}}
    with anyio.fail_after(30):
        async with stub.serve(), SglangEngine.open(folder, settings_for(stub), lora=lora, seed=0) as engine:
            await engine.load(weights, version=0)
            for role in lora.roles:
                await engine.generate(PROMPT, Sampling(max_tokens=1), deadline_s=20, adapter=lora.adapter_of(role))
            await engine.load(weights, version=1)
            while len(stub.asked("/unload_lora_adapter")) < 2:
                await anyio.lowlevel.checkpoint()
    names = [str(body["lora_name"]) for body in stub.asked("/load_lora_adapter")]
    assert len(set(names)) == 4 and [name.endswith("-worker") for name in names] == [False, True] * 2
    asked = stub.asked("/generate")
    assert [body.get("lora_path") for body in asked] == [names[0], names[1], None]
    assert len({str(body["extra_key"]) for body in asked}) == 3
    assert dropped_by(stub) == names


async def test_the_server_gets_zeros_for_the_other_parts_of_projections_it_holds_as_one(folder: Path) -> None:
    stub = Stub()
    with anyio.fail_after(30):
        async with stub.serve(), SglangEngine.open(folder, settings_for(stub), lora=LORA, seed=0) as engine:
            await engine.load(adapter(), version=0)
            written = Path(str(stub.asked("/load_lora_adapter")[0]["lora_path"]))
            tensors = {name: np.array(t.data) for name, t in read_keyframe(written / TENSOR_FILE).items()}
    layer = "base_model.model.model.layers.1."
    assert tensors[layer + "self_attn.q_proj.lora_B.weight"].min() == 1
    assert not tensors[layer + "self_attn.v_proj.lora_B.weight"].any()
    assert not tensors[layer + "mlp.gate_proj.lora_A.weight"].any()
    assert len(tensors) == 2 * 2 * 5


def test_servers_are_started_with_room_for_such_adapters() -> None:
    line = command(Path("model"), Settings(device="cpu"), LORA, port=1, seed=0)
    at = line.index("--lora-target-modules")
    assert line[at + 1 : at + 6] == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    assert line[line.index("--max-lora-rank") + 1] == "2" and "--enable-lora" in line
    assert served(Lora(target_modules=("o_proj",))).target_modules == ("o_proj",)

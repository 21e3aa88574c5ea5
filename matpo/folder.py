"""Where things lie in a run's folder."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import orjson
from pydantic import ValidationError

from matpo.config import Config
from matpo.errors import UserError
from matpo.load import SECRETS_FILE
from protocols.records import Record


class HubAddress(Record):
    """RUN/hub.json: where the running hub listens."""

    endpoint: str
    """For actors."""
    trainer_endpoint: str
    pid: int
    run: str
    born: int = 0
    """As of `process_birth`: once the hub has ended, its number may be given to another process."""


def process_birth(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; 0 where the system does not say; None for one that has
    ended, even if its parent has not looked."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # somebody else's
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return 0
    return None if state in "ZX" else int(fields[18])


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run; every path other processes rely on is named here."""

    path: Path

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Make a new folder `run.dir/name-<local time>` and write the resolved config into it."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for suffix in ("", *(f"-{n}" for n in range(2, 100))):
            folder = cls(config.run.dir / f"{config.run.name}-{stamp}{suffix}")
            try:
                folder.path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(
                    f"run.dir {str(config.run.dir)!r} cannot be written ({error.strerror}); give another"
                ) from error
            folder.write_config(config)
            return folder
        raise UserError(f"run.dir {str(config.run.dir)!r} already holds a hundred runs of this second; wait a moment")

    @classmethod
    def at(cls, path: Path, config: Config) -> RunFolder:
        """This very folder, made if need be, with the resolved config in it."""
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder.write_config(config)
        except OSError as error:
            raise UserError(f"run {str(path)!r} cannot be written ({error.strerror}); give another") from error
        return folder

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """A folder that an earlier `matpo run` made."""
        folder = cls(path)
        if not folder.config.is_file():
            raise UserError(f"run {str(path)!r} holds no config.json; give a folder that `matpo run` made")
        return folder

    def write_config(self, config: Config) -> None:
        """Write the settings; what may be secret in them goes to a file beside them that only its owner may read."""
        secrets = {name: hidden for name, entry in config.tools.mcpServers.items() if (hidden := entry.hidden())}
        if secrets:  # first: whoever finds the settings finds what they hide
            self._write(self.config.with_name(SECRETS_FILE), orjson.dumps(secrets), mode=0o600)
        self._write(self.config, orjson.dumps(config.model_dump(mode="json"), option=orjson.OPT_INDENT_2), mode=0o644)

    def _write(self, path: Path, content: bytes, *, mode: int) -> None:
        """In one step: ranks of several machines may write it at once."""
        draft = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
        draft.replace(path)

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def journal(self) -> Path:
        return self.path / "journal.sqlite"

    @property
    def archive(self) -> Path:
        """What left the journal under `hub.keep_trained = "archive"`; may be moved elsewhere or deleted."""
        return self.path / "archive.sqlite"

    @property
    def consumed(self) -> Path:
        """The trainer's own record of what it trained on."""
        return self.path / "consumed.jsonl"

    @property
    def rollbacks(self) -> Path:
        """When the run went back to a checkpoint by itself, and why."""
        return self.path / "rollbacks.jsonl"

    @property
    def hub(self) -> Path:
        return self.path / "hub.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def trainer_lock(self) -> Path:
        """Held by the one process that trains the run."""
        return self.path / "trainer.lock"

    def log(self, component: str) -> Path:
        return self.path / "logs" / f"{component}.jsonl"

    def trace(self, name: str) -> Path:
        return self.path / "traces" / f"{name}.json"

    def require_free(self) -> None:
        """Refuse to run twice in one folder."""
        address = self.hub_address()
        if address is not None:
            raise UserError(
                f"run {str(self.path)!r} is already going on (hub process {address.pid}); wait for it or stop it first"
            )

    def hub_address(self) -> HubAddress | None:
        """Where the hub listens, or None while no hub of this run is alive."""
        if not self.hub.is_file():
            return None
        try:
            address = HubAddress.model_validate_json(self.hub.read_bytes())
        except ValidationError as error:
            raise UserError(
                f"{str(self.hub)!r}, which names a run's hub, is damaged; stop that hub and remove the file"
            ) from error
        born = process_birth(address.pid)
        return None if born is None or (born and address.born and born != address.born) else address

"""What a finished run amounts to: summary.json, and one held-out question's tree before and after training."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import orjson
from pydantic import JsonValue
from tokenizers import Tokenizer

from learner.hub.batches import split_frames
from learner.hub.evaluation import EvaluationRecord, read_round
from learner.hub.figures import read_figures
from learner.hub.journal import Journal, integer, real, text
from learner.hub.ledger import Ledger, checks, read_ledger
from learner.hub.weights import Swap
from matpo.config import Config
from matpo.folder import RunFolder
from matpo.metrics import read_metrics
from protocols.codec import decode_tree
from protocols.records import EpisodeTree, Record, Trajectory


class Change(Record):
    """A figure before and after training."""

    before: float | None
    after: float | None


class Sampled(Record):
    """Training episodes, sampled at the training temperature, of one stretch of steps."""

    first_step: int
    last_step: int
    trees: int
    reward: float | None
    accuracy: float | None
    format: float | None


class Swaps(Record):
    """Engines taking new weights, over all actors."""

    count: int
    pause_median_s: float
    """How long an engine's generation stood still."""
    pause_max_s: float
    behind_median_s: float
    """From publication to use."""


class Summary(Record):
    """summary.json."""

    run: str
    complete: bool
    steps: int
    duration_s: float
    """From the first publication to the last evaluation."""
    accuracy: Change
    accuracy_by_hops: dict[str, Change]
    accuracy_by_template: dict[str, Change]
    format: Change
    reading: Change
    reward: Change
    evaluations: tuple[EvaluationRecord, ...]
    sampled_before: Sampled | None
    sampled_after: Sampled | None
    all_fail_fraction: float | None
    """Groups of all batches in which no answer scored."""
    all_pass_fraction: float | None
    episodes: int
    episodes_per_s: float
    tokens: int
    tokens_per_s: float
    sampled_tokens: int
    sampled_tokens_per_s: float
    staleness_mean: float | None
    """Optimizer steps between a tree's oldest token and the weights it was trained on."""
    staleness_max: int | None
    swaps: Swaps | None
    lineages: int
    ledger: Ledger
    ledger_adds_up: bool
    seconds: dict[str, float]
    """Per stage, summed over steps: wait_s, intake_s, step_s, publish_s, checkpoint_s of the trainer."""


class TracedTurn(Record):
    """One turn as it is shown to people."""

    kind: str
    tokens: tuple[int, ...]
    text: str | None
    """None when the tokenizer cannot be loaded."""


class TracedTrajectory(Record):
    role: str
    parent: tuple[int, int] | None
    status: str
    turns: tuple[TracedTurn, ...]


class Trace(Record):
    """traces/before.json and traces/after.json: the same question before and after training."""

    question: str
    answers: tuple[str, ...]
    rewards: dict[str, float | None]
    versions: tuple[int, ...]
    trajectories: tuple[TracedTrajectory, ...]


def write_summary(journal: Journal, config: Config, folder: RunFolder, *, complete: bool) -> Summary:
    """Write RUN/summary.json and RUN/traces and return the summary."""
    with journal.snapshot():
        summary = summarise(journal, folder, complete=complete)
        traces = matching_trees(journal)
    write_json(folder.summary, summary)
    tokenizer = load_tokenizer(config)
    for name, tree in traces.items():
        folder.trace(name).parent.mkdir(exist_ok=True)
        write_json(folder.trace(name), trace(tree, tokenizer))
    return summary


def summarise(journal: Journal, folder: RunFolder, *, complete: bool) -> Summary:
    """Read everything from the journal and the trainer's lines of metrics.jsonl."""
    names = [text(name) for (name,) in journal.rows("SELECT name FROM rounds ORDER BY began_at")]
    rounds = {name: read_round(journal, name) for name in names}
    before = rounds.get("before")
    after = rounds.get("after")
    last = journal.number("SELECT MAX(step) FROM steps WHERE undone = 0")
    episodes, tokens, sampled = (journal.counter(name) for name in ("trees", "tokens", "sampled_tokens"))
    duration_s = max(duration(journal), 1e-6)
    consumed = read_figures(journal, first=1, last=last)
    return Summary(
        run=folder.path.name,
        complete=complete,
        steps=last,
        duration_s=round(duration_s, 3),
        accuracy=change(before, after, "accuracy"),
        accuracy_by_hops=changes(before, after, "accuracy_by_hops"),
        accuracy_by_template=changes(before, after, "accuracy_by_template"),
        format=change(before, after, "format"),
        reading=change(before, after, "reading"),
        reward=change(before, after, "reward"),
        evaluations=tuple(rounds.values()),
        sampled_before=sampled_steps(journal, 1, min(2, last)),
        sampled_after=sampled_steps(journal, max(1, last - 4), last),
        all_fail_fraction=_share(consumed.all_fail_groups, consumed.groups),
        all_pass_fraction=_share(consumed.all_pass_groups, consumed.groups),
        episodes=episodes,
        episodes_per_s=round(episodes / duration_s, 3),
        tokens=tokens,
        tokens_per_s=round(tokens / duration_s, 3),
        sampled_tokens=sampled,
        sampled_tokens_per_s=round(sampled / duration_s, 3),
        staleness_mean=_rounded(consumed.staleness_mean),
        staleness_max=consumed.staleness_max,
        swaps=read_swaps(folder.metrics),
        lineages=journal.number("SELECT COUNT(*) FROM lineages"),
        ledger=read_ledger(journal),
        ledger_adds_up=all(check.holds for check in checks(journal)),
        seconds=trainer_seconds(folder.metrics),
    )


def duration(journal: Journal) -> float:
    """Seconds from the first publication to the last thing that happened."""
    first = journal.row("SELECT MIN(published_at) FROM publications")
    ends = journal.rows(
        "SELECT MAX(received_at) FROM trees UNION ALL SELECT MAX(done_at) FROM steps"
        " UNION ALL SELECT MAX(finished_at) FROM rounds UNION ALL SELECT MAX(published_at) FROM publications"
    )
    if first is None or first[0] is None:
        return 0.0
    return max(real(end) for (end,) in ends if end is not None) - real(first[0])


def sampled_steps(journal: Journal, first: int, last: int) -> Sampled | None:
    """Means over the training trees of some steps."""
    found = read_figures(journal, first=first, last=last)
    if not found.trees:
        return None
    return Sampled(
        first_step=first,
        last_step=last,
        trees=found.trees,
        reward=_rounded(found.part_mean("total")),
        accuracy=_rounded(found.part_mean("answer")),
        format=_rounded(found.part_mean("format")),
    )


def trainer_seconds(metrics: Path) -> dict[str, float]:
    """Sum of every `…_s` field of the trainer's lines."""
    total: dict[str, float] = {}
    for _, line in read_metrics(metrics):
        if line["stage"] == "trainer":
            for name, value in line.items():
                if name.endswith("_s") and isinstance(value, int | float):
                    total[name] = total.get(name, 0.0) + value
    return {name: round(value, 3) for name, value in total.items()}


def read_swaps(metrics: Path) -> Swaps | None:
    """The lines of stage `weights` together; None if there are none."""
    written = (line for _, line in read_metrics(metrics) if line["stage"] == "weights")
    lines = [Swap.model_validate({name: line[name] for name in Swap.model_fields}) for line in written]
    if not lines:
        return None
    pauses = [line.pause_s for line in lines]
    return Swaps(
        count=len(lines),
        pause_median_s=round(median(pauses), 6),
        pause_max_s=round(max(pauses), 6),
        behind_median_s=round(median(line.behind_s for line in lines), 6),
    )


def change(before: EvaluationRecord | None, after: EvaluationRecord | None, field: str) -> Change:
    """One figure of two rounds."""
    return Change(before=_figure(before, field), after=_figure(after, field))


def changes(before: EvaluationRecord | None, after: EvaluationRecord | None, field: str) -> dict[str, Change]:
    """A figure by hops or template of two rounds."""
    first, last = _figures(before, field), _figures(after, field)
    return {name: Change(before=first.get(name), after=last.get(name)) for name in sorted({*first, *last})}


def matching_trees(journal: Journal) -> dict[str, EpisodeTree]:
    """The trees of one question in the rounds before and after, preferring one that training turned from wrong to
    right, with most hops."""
    rows = journal.rows(
        "SELECT one.seq, two.seq FROM groups AS a JOIN groups AS b USING (task_id)"
        " JOIN trees AS one ON one.group_seq = a.seq JOIN trees AS two ON two.group_seq = b.seq"
        " WHERE a.round = 'before' AND b.round = 'after' AND one.reward IS NOT NULL AND two.reward IS NOT NULL"
        " ORDER BY (two.rewards ->> '$.answer' >= 1) DESC, (one.rewards ->> '$.answer' >= 1),"
        " a.task ->> '$.metadata.hops' DESC, one.seq, two.seq LIMIT 1"
    )
    pairs = [("before", integer(first)) for first, _ in rows] + [("after", integer(second)) for _, second in rows]
    return {name: read_tree(journal, seq) for name, seq in pairs}


def read_tree(journal: Journal, seq: int) -> EpisodeTree:
    """One tree of the journal."""
    row = journal.row("SELECT sizes, data FROM frames WHERE tree_seq = ?", (seq,))
    assert row is not None, f"tree {seq} has no frames"
    return decode_tree(split_frames(row))


def trace(tree: EpisodeTree, tokenizer: Tokenizer | None) -> Trace:
    """A tree for people."""
    return Trace(
        question=tree.task.question,
        answers=tree.task.answers,
        rewards=tree.rewards,
        versions=tree.versions,
        trajectories=tuple(_traced(trajectory, tokenizer) for trajectory in tree.trajectories),
    )


def load_tokenizer(config: Config) -> Tokenizer | None:
    """The model's fast tokenizer, if it has one."""
    file = config.model.path.expanduser() / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.is_file() else None


def write_json(path: Path, record: Record) -> None:
    """Write a record for people and programs, in one step."""
    draft = path.with_suffix(".tmp")
    draft.write_bytes(orjson.dumps(record.model_dump(mode="json"), option=orjson.OPT_INDENT_2) + b"\n")
    draft.replace(path)


def _traced(trajectory: Trajectory, tokenizer: Tokenizer | None) -> TracedTrajectory:
    turns = []
    for turn in trajectory.turns:
        tokens = [int(token) for token in trajectory.tokens[turn.start : turn.stop]]
        words = None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=False)
        turns.append(TracedTurn(kind=turn.kind, tokens=tuple(tokens), text=words))
    return TracedTrajectory(
        role=trajectory.role, parent=trajectory.parent, status=trajectory.status, turns=tuple(turns)
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _fields(record: EvaluationRecord | None) -> dict[str, JsonValue]:
    return {} if record is None else record.model_dump(mode="json")


def _figure(record: EvaluationRecord | None, field: str) -> float | None:
    value = _fields(record).get(field)
    return float(value) if isinstance(value, int | float) else None


def _figures(record: EvaluationRecord | None, field: str) -> dict[str, float]:
    values = _fields(record).get(field)
    found = values.items() if isinstance(values, dict) else ()
    return {name: float(value) for name, value in found if isinstance(value, int | float)}

"""Filter Something-Something V2 (SSv2) annotations to a few tasks and sample from them.

    python -m data.dataset --data_dir data/sthv2

reads `annotations/train.json` and `annotations/validation.json` (or SSv2's published names,
`something-something-v2-train.json` and `-validation.json`) and writes `train_filtered.json` and
`val_filtered.json` beside them: the sampled entries, each with its `task`. The next step is
`python -m data.video_loader`. The paths and the annotation format that all later steps share live here too.
"""

import argparse
import gc
import hashlib
from collections import Counter
from pathlib import Path

from data.layout import (
    DEFAULT_DATA_DIR,
    DOWNLOAD_HINT,
    SPLITS,
    UserError,
    filtered_annotations_path,
    list_videos,
    read_annotations,
    run_command,
    video_path,
    write_annotations,
    write_file,
)

SOURCE_NAMES = {
    "train": ("train.json", "something-something-v2-train.json"),
    "val": ("validation.json", "something-something-v2-validation.json"),
}

# The rule. A template belongs to a task when its wording alone guarantees that the following really happens
# to a whole, solid object in front of a still camera:
#   move_object   a hand moves the object sideways or up and down (not along the line of sight), and keeps
#                 hold of it or leaves it where the movement ends; nothing falls or collides.
#   drop_object   the object falls freely: let go, pushed, moved or tilted off what held it, or thrown up.
#   cover_object  a hand sets the object down, or covers it with another, and it stays as it was left.
# So none of these is in any task:
#   pretending, trying and failing; a placement after which the object falls, slides or tips over;
#   a fall that is only threatened ("almost falls off") or ends in a catch;
#   parts and ends of objects; collisions, spins, rolls, pokes and throws at a target; camera movements;
#   substances (pouring, spreading, sprinkling, burying); joining and building (plugging, stuffing, stacking).
# Names are SSv2's own, brackets removed. They are compared whole: excluded names contain included ones.
TASK_TEMPLATES: dict[str, tuple[str, ...]] = {
    "move_object": (
        "Lifting something up completely without letting it drop down",
        "Lifting something with something on it",
        "Moving something across a surface without it falling down",
        "Moving something and something away from each other",
        "Moving something and something closer to each other",
        "Moving something and something so they pass each other",
        "Moving something away from something",
        "Moving something closer to something",
        "Moving something down",
        "Moving something up",
        "Picking something up",
        "Pulling something from left to right",
        "Pulling something from right to left",
        "Pushing something from left to right",
        "Pushing something from right to left",
        "Pushing something so that it slightly moves",
    ),
    "drop_object": (
        "Dropping something behind something",
        "Dropping something in front of something",
        "Dropping something into something",
        "Dropping something next to something",
        "Dropping something onto something",
        "Lifting something up completely, then letting it drop down",
        "Moving something across a surface until it falls down",
        "Pushing something off of something",
        "Pushing something so that it falls off the table",
        "Something falling like a feather or paper",
        "Something falling like a rock",
        "Throwing something in the air and letting it fall",
        "Tilting something with something on it until it falls off",
    ),
    "cover_object": (
        "Covering something with something",
        "Laying something on the table on its side, not upright",
        "Putting number of something onto something",
        "Putting something and something on the table",
        "Putting something behind something",
        "Putting something in front of something",
        "Putting something into something",
        "Putting something next to something",
        "Putting something on a flat surface without letting it roll",
        "Putting something on a surface",
        "Putting something onto a slanted surface but it doesn't glide down",
        "Putting something onto something",
        "Putting something similar to other things that are already on the table",
        "Putting something that can't roll onto a slanted surface, so it stays where it is",
        "Putting something underneath something",
        "Putting something upright on the table",
        "Putting something, something and something on the table",
    ),
}


# Paths. Each has its one home here.


def _source_annotations_path(data_dir: Path, split: str) -> Path:
    folder = data_dir / "annotations"
    for name in SOURCE_NAMES[split]:
        if (folder / name).exists():
            return folder / name
    raise UserError(
        f"no {' or '.join(SOURCE_NAMES[split])} in {folder}: {DOWNLOAD_HINT} and put its annotation files"
        " there, or name another folder with --data_dir"
    )


# Annotations.


def plain_template(template: str) -> str:
    """The template's official name: "Moving [something] up" -> "Moving something up"."""
    return template.replace("[", "").replace("]", "")


# Filtering and sampling.


def match_tasks(entries: list[dict], tasks: list[str]) -> dict[str, list[dict]]:
    """The entries of each task, with `task` added as a key: {task: entries}, in the order of `entries`."""
    task_of_template = {template: task for task in tasks for template in TASK_TEMPLATES[task]}
    task_of_raw: dict[str, str | None] = {}  # a few hundred distinct strings; saves removing brackets 220,000 times
    matched: dict[str, list[dict]] = {task: [] for task in tasks}
    for entry in entries:
        raw = entry["template"]
        if raw not in task_of_raw:
            task_of_raw[raw] = task_of_template.get(plain_template(raw))
        task = task_of_raw[raw]
        if task is not None:
            matched[task].append({**entry, "task": task})
    return matched


def sampling_rank(seed: int, video_id: str) -> bytes:
    """A video's place in the seeded shuffle: a hash, so it depends on nothing but the seed and the id."""
    return hashlib.sha256(f"{seed}:{video_id}".encode()).digest()


def sample_entries(entries: list[dict], count: int, seed: int) -> list[dict]:
    """The `count` entries that come first in the seeded shuffle (all if there are fewer), in its order.

    Whether an entry is taken depends only on the seed and on the ids it competes with: not on the order of
    the file, nor on other tasks. A smaller sample is the beginning of a larger one.
    """
    return sorted(entries, key=lambda entry: sampling_rank(seed, entry["id"]))[:count]


def drop_shared_ids(train: list[dict], val: list[dict], seed: int) -> tuple[list[dict], list[dict], int]:
    """Give each id that both files hold to one of them: a tenth to validation, the others to training.

    Which tenth follows from the seed alone. Returns the two lists and the number of shared ids.
    """
    shared = {entry["id"] for entry in train} & {entry["id"] for entry in val}
    if not shared:
        return train, val, 0
    to_val = {video_id for video_id in shared if sampling_rank(seed, video_id)[0] < 256 // 10}
    train = [entry for entry in train if entry["id"] not in to_val]
    val = [entry for entry in val if entry["id"] not in shared - to_val]
    return train, val, len(shared)


def keep_existing(
    matched: dict[str, dict[str, list[dict]]], data_dir: Path
) -> tuple[dict[str, dict[str, list[dict]]], str | None]:
    """Keep the entries ({split: {task: entries}}) whose video exists, and say how many were missing.

    Without any videos everything is kept. Raises UserError if there are videos, but none of those that match.
    """
    videos = list_videos(data_dir)
    folder = data_dir / "videos"
    if videos is None:
        return matched, f"No videos in {folder} yet: sampled from all matching entries."
    available = {
        split: {task: [entry for entry in found if f"{entry['id']}.webm" in videos] for task, found in by_task.items()}
        for split, by_task in matched.items()
    }
    num_matched, num_available = (
        sum(len(found) for by_task in stage.values() for found in by_task.values()) for stage in (matched, available)
    )
    if num_available == 0:
        example = next(found[0]["id"] for found in matched["train"].values() if found)
        raise UserError(
            f"none of the {num_matched} matching videos is in {folder};"
            f" expected files such as {video_path(data_dir, example)}"
        )
    if num_available < num_matched:
        return available, (
            f"{num_matched - num_available} of {num_matched} matching videos are missing from {folder}:"
            f" sampled from the {num_available} that exist."
        )
    return available, None


def build_parser() -> argparse.ArgumentParser:
    """The command line of `python -m data.dataset`."""
    parser = argparse.ArgumentParser(
        prog="python -m data.dataset",
        description="Filter SSv2's annotations to the tasks, sample from them, and write"
        " train_filtered.json and val_filtered.json. Counts per template go to annotations/filter.log.",
    )
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="default: %(default)s")
    parser.add_argument("--train_samples_per_task", type=_count, default=1000, help="default: %(default)s")
    parser.add_argument("--val_samples_per_task", type=_count, default=100, help="default: %(default)s")
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASK_TEMPLATES), default=list(TASK_TEMPLATES), help="default: all"
    )
    parser.add_argument("--seed", type=int, default=42, help="same seed, same output (default: %(default)s)")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main() -> None:
    args = build_parser().parse_args()
    gc.disable()  # looking for garbage among 220,000 entries takes longer than the work
    tasks = list(dict.fromkeys(args.tasks))
    counts = {"train": args.train_samples_per_task, "val": args.val_samples_per_task}

    sources = {split: _source_annotations_path(args.data_dir, split) for split in SPLITS}
    entries = {split: read_annotations(sources[split]) for split in SPLITS}
    entries["train"], entries["val"], num_shared = drop_shared_ids(entries["train"], entries["val"], args.seed)
    matched = {split: match_tasks(entries[split], tasks) for split in SPLITS}
    if not any(matched["train"].values()):
        raise UserError(f"{sources['train']}: no entry has a template of {', '.join(tasks)}")

    notes = []
    if num_shared:
        notes.append(
            f"{num_shared} ids are in both annotation files: a tenth of them is kept for validation only, the"
            " others for training only."
        )
    available, note = keep_existing(matched, args.data_dir)
    if note:
        notes.append(note)
    sampled = {
        split: {task: sample_entries(available[split][task], counts[split], args.seed) for task in tasks}
        for split in SPLITS
    }
    for split in SPLITS:
        for task in tasks:
            if len(sampled[split][task]) < counts[split]:
                notes.append(f"{task}, {split}: asked for {counts[split]}, took all {len(sampled[split][task])}.")

    # Nothing is written before everything is known to be good. The shuffled order mixes the tasks, so that
    # the first N entries (--limit of the extraction) are a fair sample of the whole.
    for split in SPLITS:
        chosen = [entry for task in tasks for entry in sampled[split][task]]
        write_annotations(
            filtered_annotations_path(args.data_dir, split), sample_entries(chosen, len(chosen), args.seed)
        )
    report = "\n".join([_task_table(tasks, matched, available, sampled), *notes])
    log_path = args.data_dir / "annotations" / "filter.log"
    write_file(log_path, f"seed {args.seed}\n{report}\n\n{_template_table(tasks, matched, available, sampled)}\n")
    print(report)
    print(f"Wrote {' and '.join(str(filtered_annotations_path(args.data_dir, split)) for split in SPLITS)}.")
    print(f"Counts per template: {log_path}. Next: python -m data.video_loader --data_dir {args.data_dir}")


def _task_table(tasks: list[str], *stages: dict[str, dict[str, list[dict]]]) -> str:
    """One line per task and split; `stages` are {split: {task: entries}}: matched, with a video, sampled."""
    lines = [f"{'task':<14}{'split':<7}{'matched':>9}{'with video':>12}{'sampled':>9}"]
    for task in tasks:
        for split in SPLITS:
            matched, available, sampled = (len(stage[split][task]) for stage in stages)
            lines.append(f"{task:<14}{split:<7}{matched:>9}{available:>12}{sampled:>9}")
    return "\n".join(lines)


def _template_table(tasks: list[str], *stages: dict[str, dict[str, list[dict]]]) -> str:
    """One line per split, task and template, with the same counts as the table of tasks."""
    lines = ["split  task          matched  with video  sampled  template"]
    for split in SPLITS:
        for task in tasks:
            counters = [Counter(plain_template(entry["template"]) for entry in stage[split][task]) for stage in stages]
            for template in TASK_TEMPLATES[task]:
                matched, available, sampled = (counter[template] for counter in counters)
                lines.append(f"{split:<7}{task:<14}{matched:>7}{available:>12}{sampled:>9}  {template}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)

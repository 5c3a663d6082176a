"""Filter Something-Something V2 (SSv2) annotations to a few tasks and sample from them.

    python -m data.dataset --data_dir data/sthv2

reads `annotations/train.json` and `annotations/validation.json` (or SSv2's published names,
`something-something-v2-train.json` and `-validation.json`) and writes `train_filtered.json` and
`val_filtered.json` beside them: the sampled entries, each with its `task`. Next: `python -m data.video_loader`.
"""

import argparse
import gc
import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data import layout
from data.layout import SPLITS, UserError

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


def plain_template(template: str) -> str:
    """The template's official name: "Moving [something] up" -> "Moving something up"."""
    return template.replace("[", "").replace("]", "")


def match_tasks(entries: list[dict], tasks: list[str]) -> list[dict]:
    """The entries whose template belongs to one of the tasks, with `task` added as a key, in the same order."""
    task_of = {template: task for task in tasks for template in TASK_TEMPLATES[task]}
    found = ((entry, task_of.get(plain_template(entry["template"]))) for entry in entries)
    return [{**entry, "task": task} for entry, task in found if task]


def sampling_rank(seed: int, video_id: str) -> bytes:
    """A video's place in the seeded shuffle: a hash, so it depends on nothing but the seed and the id."""
    return hashlib.sha256(f"{seed}:{video_id}".encode()).digest()


def sample_entries(entries: list[dict], count: int, seed: int) -> list[dict]:
    """The `count` entries of each task that come first in the seeded shuffle (all if there are fewer), in its order.

    The choice depends on the seed and on the ids of a task, not on the order of the file or on other tasks. A smaller
    sample is part of a larger one, and the first N entries (the extraction's --limit) are a fair sample of all tasks.
    """
    taken: Counter[str] = Counter()
    sampled = []
    for entry in sorted(entries, key=lambda entry: sampling_rank(seed, entry["id"])):
        if taken[entry["task"]] < count:
            taken[entry["task"]] += 1
            sampled.append(entry)
    return sampled


def drop_shared_ids(train: list[dict], val: list[dict], seed: int) -> tuple[list[dict], list[dict], int]:
    """Give each id that both files hold to one of them: a tenth to validation, the others to training.

    Which tenth follows from the seed alone. Returns the two lists and the number of shared ids.
    """
    shared = {entry["id"] for entry in train} & {entry["id"] for entry in val}
    to_val = {video_id for video_id in shared if sampling_rank(seed, video_id)[0] < 256 // 10}
    train = [entry for entry in train if entry["id"] not in to_val]
    val = [entry for entry in val if entry["id"] not in shared - to_val]
    return train, val, len(shared)


def keep_existing(matched: dict[str, list[dict]], data_dir: Path) -> tuple[dict[str, list[dict]], list[str]]:
    """Keep the entries ({split: entries}) whose video exists, and note how many were missing.

    Without any videos everything is kept. Raises UserError if there are videos, but none of those that match.
    """
    videos, folder = layout.list_videos(data_dir), data_dir / "videos"
    if videos is None:
        return matched, [f"No videos in {folder} yet: sampled from all matching entries."]
    available = {split: [entry for entry in matched[split] if f"{entry['id']}.webm" in videos] for split in SPLITS}
    num_matched, num_available = (sum(map(len, stage.values())) for stage in (matched, available))
    if num_available == 0:
        example = layout.video_path(data_dir, matched["train"][0]["id"])
        raise UserError(f"none of the {num_matched} matching videos is in {folder}; expected files such as {example}")
    if num_available == num_matched:
        return available, []
    missing = f"{num_matched - num_available} of {num_matched} matching videos are missing from {folder}"
    return available, [f"{missing}: sampled from the {num_available} that exist."]


def count_entries(entries: dict[str, list[dict]]) -> Counter:
    """The number of entries ({split: entries}) of each (split, task, template), and of each (split, task, "")."""
    return Counter(
        (split, entry["task"], template)
        for split in SPLITS
        for entry in entries[split]
        for template in ("", plain_template(entry["template"]))
    )


def count_table(counters: list[Counter], templates: dict[str, Iterable[str]]) -> str:
    """One line per split and {task: template}, "" being all templates; a column for each stage of the sampling."""
    lines = [f"{'task':<14}{'split':<7}{'matched':>9}{'with video':>12}{'sampled':>9}"]
    for task, names in templates.items():
        for split in SPLITS:
            for name in names:
                matched, available, sampled = (counter[split, task, name] for counter in counters)
                lines.append(f"{task:<14}{split:<7}{matched:>9}{available:>12}{sampled:>9}  {name}".rstrip())
    return "\n".join(lines)


# The command.


def parse_args() -> argparse.Namespace:
    parser = layout.CommandParser(
        prog="python -m data.dataset",
        description="Filter SSv2's annotations to the tasks, sample from them, and write"
        " train_filtered.json and val_filtered.json. Counts per template go to annotations/filter.log.",
    )
    count, tasks = layout.number(at_least=1), list(TASK_TEMPLATES)
    parser.add_argument("--data_dir", type=Path, default=layout.DEFAULT_DATA_DIR, help="default: %(default)s")
    parser.add_argument("--train_samples_per_task", type=count, default=1000, help="default: %(default)s")
    parser.add_argument("--val_samples_per_task", type=count, default=100, help="default: %(default)s")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, help="default: all")
    parser.add_argument("--seed", type=layout.number(), default=42, help="of the choice; default: %(default)s")
    return parser.parse_args()


def find_source(data_dir: Path, split: str) -> Path:
    """SSv2's annotation file of a split, under either of its names."""
    folder = data_dir / "annotations"
    for name in SOURCE_NAMES[split]:
        if (folder / name).exists():
            return folder / name
    wanted = " or ".join(SOURCE_NAMES[split])
    raise UserError(f"no {wanted} in {folder}: {layout.DOWNLOAD_HINT} and put it there, or name another --data_dir")


def main() -> None:
    args = parse_args()
    gc.disable()  # looking for garbage among 220,000 entries takes longer than the work
    tasks = list(dict.fromkeys(args.tasks))
    asked = {"train": args.train_samples_per_task, "val": args.val_samples_per_task}

    sources = [find_source(args.data_dir, split) for split in SPLITS]
    train, val, num_shared = drop_shared_ids(*map(layout.read_annotations, sources), args.seed)
    matched = {"train": match_tasks(train, tasks), "val": match_tasks(val, tasks)}
    if not matched["train"]:
        raise UserError(f"{sources[0]}: no entry has a template of {', '.join(tasks)}")
    available, notes = keep_existing(matched, args.data_dir)
    sampled = {split: sample_entries(available[split], asked[split], args.seed) for split in SPLITS}

    counters = [count_entries(stage) for stage in (matched, available, sampled)]
    report = [count_table(counters, {task: [""] for task in tasks})]
    if num_shared:
        rule = "a tenth of them is kept for validation only, the others for training only"
        report.append(f"{num_shared} ids are in both annotation files: {rule}.")
    report += notes
    for split in SPLITS:
        for task in tasks:
            if (count := counters[-1][split, task, ""]) < asked[split]:
                report.append(f"{task}, {split}: asked for {asked[split]}, took all {count}.")

    outputs = {split: layout.filtered_annotations_path(args.data_dir, split) for split in SPLITS}
    for split in SPLITS:  # nothing is written before everything is known to be good
        layout.write_annotations(outputs[split], sampled[split])
    log_path = args.data_dir / "annotations" / "filter.log"
    per_template = count_table(counters, {task: TASK_TEMPLATES[task] for task in tasks})
    layout.write_file(log_path, "\n".join([f"seed {args.seed}", *report, "", per_template, ""]))
    print("\n".join(report))
    print(f"Wrote {outputs['train']} and {outputs['val']}.")
    print(f"Counts per template: {log_path}. Next: python -m data.video_loader --data_dir {args.data_dir}")


if __name__ == "__main__":
    layout.run_command(main)

"""Filter Something-Something V2 (SSv2) annotations to a few tasks and sample from them.

    python -m data.dataset --data_dir data/sthv2

reads `annotations/train.json` and `annotations/validation.json` (or SSv2's published names,
`something-something-v2-train.json` and `-validation.json`) and writes `train_filtered.json` and
`val_filtered.json` beside them: the sampled entries, each with its `task`. Next: `python -m data.video_loader`.
"""

import argparse
import difflib
import operator
from collections import Counter
from pathlib import Path

from data import cli, files, paths
from data.cli import UserError
from data.clips import choose_balanced
from data.paths import SPLITS, VIDEO_EXTENSIONS

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

SSV2_TEMPLATES = Path(__file__).with_name("ssv2_templates.txt")  # all 174, as the dataset's labels.json lists them


def check_templates() -> None:
    """Raise UserError where a template above is none of SSv2's, which would match nothing, or is in two tasks."""
    official = SSV2_TEMPLATES.read_text(encoding="utf-8").splitlines()
    task_of: dict[str, str] = {}
    for task, templates in TASK_TEMPLATES.items():
        if isinstance(templates, str):
            raise UserError(f"data/dataset.py, {task}: a single template needs a comma after it: ({templates!r},)")
        for template in templates:
            if template not in official:
                [nearest] = difflib.get_close_matches(template, official, n=1, cutoff=0)
                raise UserError(f"data/dataset.py, {task}: SSv2 has no template {template!r}, but {nearest!r}")
            if task_of.setdefault(template, task) != task:
                raise UserError(f"data/dataset.py: {template!r} is in {task_of[template]} and in {task}")


def plain_template(template: str) -> str:
    """The template's official name: "Moving [something] up" -> "Moving something up"."""
    return template.replace("[", "").replace("]", "")


def match_tasks(entries: list[dict], tasks: list[str]) -> list[dict]:
    """The entries whose template belongs to one of the tasks, with `task` added as a key, in the same order."""
    task_of = {template: task for task in tasks for template in TASK_TEMPLATES[task]}
    found = ((entry, task_of.get(plain_template(entry.get("template", "")))) for entry in entries)
    return [{**entry, "task": task} for entry, task in found if task]


def count_table(stages: list[dict[str, list[dict]]], tasks: list[str]) -> str:
    """One line per task and split, with a column for each stage of the sampling ({split: entries})."""
    counts = [Counter((split, entry["task"]) for split in SPLITS for entry in stage[split]) for stage in stages]
    width = max(map(len, tasks)) + 2
    lines = [f"{'task':<{width}}{'split':<7}{'matched':>9}{'with video':>12}{'sampled':>9}"]
    for task in tasks:
        for split in SPLITS:
            matched, available, sampled = (count[split, task] for count in counts)
            lines.append(f"{task:<{width}}{split:<7}{matched:>9}{available:>12}{sampled:>9}")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = cli.CommandParser(
        prog="python -m data.dataset",
        description="Filter SSv2's annotations to the tasks, sample from them, and write"
        " train_filtered.json and val_filtered.json.",
    )
    count, tasks = cli.number(at_least=1), list(TASK_TEMPLATES)
    parser.add_argument("--data_dir", type=Path, default=paths.DEFAULT_DATA_DIR, help="default: %(default)s")
    parser.add_argument("--train_samples_per_task", type=count, default=1000, help="default: %(default)s")
    parser.add_argument("--val_samples_per_task", type=count, default=100, help="default: %(default)s")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, help="default: all")
    parser.add_argument("--seed", type=cli.number(), default=42, help="of the choice; default: %(default)s")
    return parser.parse_args()


def find_source(data_dir: Path, split: str) -> Path:
    """SSv2's annotation file of a split, under either of its names."""
    folder = data_dir / "annotations"
    for name in SOURCE_NAMES[split]:
        if (folder / name).exists():
            return folder / name
    wanted = " or ".join(SOURCE_NAMES[split])
    raise UserError(f"no {wanted} in {folder}: {paths.DOWNLOAD_HINT} and put it there, or name another --data_dir")


def main() -> None:
    args = parse_args()
    check_templates()
    asked = {"train": args.train_samples_per_task, "val": args.val_samples_per_task}
    sources = [find_source(args.data_dir, split) for split in SPLITS]
    train, val = map(paths.read_annotations, sources)
    shared = {entry["id"] for entry in train} & {entry["id"] for entry in val}
    val = [entry for entry in val if entry["id"] not in shared]
    matched = {"train": match_tasks(train, args.tasks), "val": match_tasks(val, args.tasks)}
    if not matched["train"]:
        raise UserError(f"{sources[0]}: no entry has a template of {', '.join(args.tasks)}")
    folder = args.data_dir / "videos"
    videos = {path.stem for path in folder.glob("*") if path.suffix in VIDEO_EXTENSIONS}
    available = {split: [entry for entry in matched[split] if not videos or entry["id"] in videos] for split in SPLITS}
    if not any(available.values()):
        example = f"expected files such as {paths.video_path(args.data_dir, matched['train'][0]['id'])}"
        raise UserError(f"no matching video is in {folder}; {paths.hint_to_move_videos(args.data_dir, example)}")
    task_and_id = operator.itemgetter("task", "id")
    sampled = {
        split: choose_balanced(available[split], args.seed, most_per_task=asked[split], task_and_id=task_and_id)
        for split in SPLITS
    }

    for split in SPLITS:  # nothing is written before everything is known to be good
        files.write_json(paths.filtered_annotations_path(args.data_dir, split), sampled[split])
    print(count_table([matched, available, sampled], args.tasks))
    if not videos:
        unpack = paths.command("unpack", args.data_dir)
        print(f"No videos in {folder} yet: sampled from all matching entries. First: {unpack} --archives DIR")
    if (not videos or available != matched) and (hint := paths.hint_to_move_videos(args.data_dir, "")):
        cli.warn(f"videos lie outside {folder}; {hint}")
    if not sampled["val"]:
        cli.warn("no validation video is chosen, so training can neither validate nor be scored; get more videos")
    if shared:
        print(f"{len(shared)} ids are in both annotation files: they are used for training only.")
    print(f"Wrote train_filtered.json and val_filtered.json. Next: {paths.command('video_loader', args.data_dir)}")


if __name__ == "__main__":
    cli.run_command(main)

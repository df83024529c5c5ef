"""The command line.

    megamug train CONFIG.yaml [section.key=value ...] [--dry-run [--world-size N]]
    torchrun --nproc-per-node 8 -m megamug train CONFIG.yaml parallel.tensor=2
    megamug evaluate RUN --task captioning|retrieval|perplexity|classification ...
    megamug generate RUN --images PATH...                (MUG)
    megamug generate RUN --prompt TEXT [--image PATH]    (language models)
    megamug plan CONFIG.yaml --gpus N --gpu h100|h200|a100 [section.key=value ...]
    megamug doctor
    megamug data shards|index|tokenizer|image-tokenizer|vocabulary|documents|demo|demo-documents ...
    megamug convert|inspect|fuse|benchmark ...           (see `megamug.commands`)

Exit codes: 0 finished; 2 the user's mistake, told in one sentence before any process group exists; 3 stopped on request
with a checkpoint saved; 130 ended by Ctrl-C; 1 failure. Checks come before torch is imported wherever they can.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import megamug
from megamug import commands
from megamug.command_line import console, launcher
from megamug.command_line.arguments import Parser
from megamug.command_line.launcher import world_size
from megamug.command_line.tool import INTERRUPTED, STOPPED, of_a_file
from megamug.configuration import validate, validate_classifier
from megamug.configuration.checks import segmenter
from megamug.configuration.presets import FINE_TUNED
from megamug.configuration.reading import check_own_folder, load_config, resolve
from megamug.durable import folder_problem
from megamug.errors import UserError
from megamug.evaluate import OF_KIND, TASKS
from megamug.generation import options

# Options of `generate` that one family of models has; the others concern both.
MUG_OPTIONS = ("images", "mask_ratio")
LM_OPTIONS = (
    "prompt", "image", "max_images", "max_tokens", "guidance", "contrastive", "contrastive_top_k", "samples", "seed",
)  # fmt: skip
RANGED = (
    "mask_ratio", "top_p", "temperature", "max_images", "max_tokens", "guidance", "contrastive", "contrastive_top_k",
    "samples", "seed",
)  # fmt: skip
EXIT_USER_ERROR = 2
PATIENCE_SECONDS = 30.0  # how much later than the others a process may come to the same mistake


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `argv` without the program's name."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = commands.split(argv)
    try:
        with console.own(), console.interruptible():
            if command is not None:
                name, work = command[1], lambda: _command(*command)
            else:
                arguments = _parse(argv)
                name, work = f"megamug {argv[0]}", lambda: arguments.run(arguments)
            with console.announcing(name) if _speaks() else nullcontext():
                return work()
    except UserError as error:
        _tell(f"megamug: error: {error}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if command is not None and _speaks():
            print(STOPPED, file=sys.stderr)
        return INTERRUPTED


def _command(module: str, prog: str, argv: list[str]) -> int:
    try:
        return commands.run(module, argv, prog)
    except OSError as error:
        raise UserError(of_a_file(error)) from None


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("megamug", description=megamug.__doc__)
    parser.add_argument("--version", action="version", version=f"megamug {megamug.__version__}")
    commands_of = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands_of.add_parser("train", help="train, or go on from the newest complete checkpoint")
    train.add_argument("config", metavar="CONFIG.yaml", type=Path)
    train.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help="win over the file")
    train.add_argument("--dry-run", action="store_true", help="check, print layout, parameters, memory, FLOPs")
    train.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: as on N processes elsewhere")
    train.set_defaults(run=_train)

    evaluate = commands_of.add_parser("evaluate", help="measure a trained model on held-out data")
    _add_run(evaluate)
    evaluate.add_argument("--task", choices=TASKS, required=True)
    evaluate.add_argument(
        "--samples", type=int, metavar="N",
        help="at most so many (default: data.validation_samples; classification, segmentation, choices: all)",
    )  # fmt: skip
    evaluate.add_argument(
        "--data", nargs="+", metavar="PATH",
        help="shards, or folders of tokenised documents (default: data.validation of the run), or files of the suite",
    )  # fmt: skip
    evaluate.add_argument(
        "--suite", metavar="NAME",
        help="choices: piqa, arc, hellaswag, winogrande, storycloze or file, read from --data; or lm-eval:TASK[,TASK]",
    )  # fmt: skip
    evaluate.add_argument(
        "--references", type=Path, metavar="FILE",
        help="captioning: true captions, a .json as COCO writes it (default: those of the data)",
    )  # fmt: skip
    evaluate.add_argument("--predictions", action="store_true",
                          help="segmentation: write the classes of every image as a PNG, too")  # fmt: skip
    evaluate.set_defaults(run=_evaluate)

    _add_generate(commands_of.add_parser(
        "generate", help="repaint and caption pictures, or write documents of text and images"
    ))  # fmt: skip

    _add_plan(commands_of.add_parser("plan", help="the layouts that fit so many GPUs, fastest first"))

    doctor = commands_of.add_parser("doctor", help="what of this machine and its packages can be used")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)

    # these are for the list of `--help` and for words that are none of them: `main` has run those that are
    data = commands_of.add_parser("data", help="prepare data; `megamug data --help` lists how")
    for where, names in ((commands_of, commands.COMMANDS), (data.add_subparsers(metavar="COMMAND", required=True),
                                                            commands.DATA)):  # fmt: skip
        for name, (_, what) in names.items():
            where.add_parser(name, help=what)

    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no positionals behind an option: `train CONFIG.yaml --dry-run train.steps=5`
    takes = arguments.run in (_train, _plan)
    late = [word for word in rest if takes and "=" in word and not word.startswith("-")]
    if len(late) < len(rest):
        unknown = next(word for word in rest if word not in late)
        parser.error(f"unrecognised argument {unknown}")
    if late:
        arguments.overrides = [*arguments.overrides, *late]
    return arguments


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    both = parser.add_argument_group("both kinds of model")
    both.add_argument("--top-p", type=float, metavar="P", help="draw from the top P of probability (MUG: default is the"
                      " likeliest token; language models: 0.9)")  # fmt: skip
    both.add_argument("--temperature", type=float, metavar="T", default=1.0,
                      help="of drawing (default: 1; language models: 0 is always the likeliest)")  # fmt: skip
    mug = parser.add_argument_group("MUG")
    mug.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="files or folders")
    mug.add_argument("--mask-ratio", type=float, metavar="R", help="share of hidden patches (default: the run's)")
    lm = parser.add_argument_group("language models")
    lm.add_argument("--prompt", nargs="+", metavar="TEXT",
                    help="the document's beginning; several are written side by side; one that ends in <break> is"
                    " followed by an image at once")  # fmt: skip
    lm.add_argument("--image", type=Path, metavar="PATH", help="a picture that stands before the prompt")
    lm.add_argument("--max-images", type=int, metavar="N", help="images to write (default: as many as fit)")
    lm.add_argument("--max-tokens", type=int, metavar="N", help="tokens to write (default: what the context holds)")
    lm.add_argument("--guidance", type=float, metavar="ALPHA", help="classifier-free guidance of images by their text")
    lm.add_argument("--contrastive", type=float, metavar="ALPHA", help="contrastive decoding of images: codes of at"
                    " least ALPHA times the k-th largest probability")  # fmt: skip
    lm.add_argument("--contrastive-top-k", type=int, metavar="K", help="the k of --contrastive (default: 1)")
    lm.add_argument("--samples", type=int, metavar="N", help="documents for each prompt (default: 1)")
    lm.add_argument("--seed", type=int, metavar="S", help="of the draws (default: the run's)")
    parser.set_defaults(run=_generate)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path)
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", default=[],
                        help="win over the file; every layout keeps what is set here")  # fmt: skip
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all, eight a node")
    parser.add_argument("--gpu", choices=("h100", "h200", "a100"), required=True, help="their kind")
    parser.add_argument("--memory", type=float, metavar="GiB", help="of one GPU (default: what that kind has)")
    parser.add_argument("--vocabulary-size", type=int, metavar="N", help="default: that of data.tokenizer")
    parser.add_argument("--top", type=int, metavar="N", default=10, help="layouts in the table (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of them, and why the others do not fit")
    parser.set_defaults(run=_plan)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run folder (run_dir of its configuration)")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest complete one")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where pictures and figures go (default: in RUN)")
    parser.add_argument("--json", action="store_true", help="print what was found even where stdout is a terminal")


def _train(arguments: argparse.Namespace) -> int:
    elsewhere = arguments.world_size is not None
    if elsewhere and not arguments.dry_run:
        raise UserError("--world-size goes with --dry-run; processes are started by torchrun or a scheduler")
    if elsewhere and arguments.world_size < 1:
        raise UserError(f"--world-size is {arguments.world_size}; it must be at least 1")
    if not elsewhere:
        launcher.adopt()
    size = arguments.world_size if elsewhere else world_size()
    config = resolve(load_config(arguments.config, arguments.overrides))
    check_own_folder(arguments.config, config, arguments.overrides)
    validate.validate(config, size, here=not elsewhere)
    of_the_data = {"classifier": validate_classifier.with_classes, "segmenter": segmenter.filled}
    if config.model.kind in of_the_data:
        config = of_the_data[config.model.kind](config)
    if arguments.dry_run:
        from megamug.planner import dry_run

        if _speaks():
            print(dry_run.layout_text(config, size))
        return 0
    launcher.check_address()
    from megamug.training import trainer

    return trainer.train(config)


def _evaluate(arguments: argparse.Namespace) -> int:
    _check_run(arguments)
    if arguments.samples is not None and arguments.samples < 1:
        raise UserError(f"--samples is {arguments.samples}; it must be at least 1")
    if arguments.predictions and arguments.task != "segmentation":
        raise UserError(f"--predictions is of --task segmentation, and the task is {arguments.task}; leave it out")
    data = arguments.data
    if data is not None and len(data) == 1:
        data = data[0]
    from megamug import evaluate

    figures = evaluate.run_task(
        arguments.run_dir, arguments.task, step=arguments.checkpoint, samples=arguments.samples, data=data,
        output=arguments.output, references=arguments.references, suite=arguments.suite,
        predictions=arguments.predictions,
    )
    _print_json(figures, arguments.json)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    _check_run(arguments)
    kind = load_config(arguments.run_dir / "config.yaml").model.kind
    if kind in FINE_TUNED:
        raise UserError(f"{arguments.run_dir} is a run of a {kind}, which writes nothing; measure it by megamug"
                        f" evaluate {arguments.run_dir} --task {OF_KIND[kind][0]}")
    foreign = LM_OPTIONS if kind == "mug" else MUG_OPTIONS
    given = [name for name in foreign if getattr(arguments, name) is not None]
    if given:
        raise UserError(f"{options.flag(given[0])} is not for {arguments.run_dir}, a run of {kind}; its options are"
                        f" {', '.join(map(options.flag, MUG_OPTIONS if kind == 'mug' else LM_OPTIONS))}")
    options.check(kind, {name: getattr(arguments, name) for name in RANGED})
    figures = (_generate_from_images if kind == "mug" else _generate_documents)(arguments)
    _print_json(figures, arguments.json)
    return 0


def _generate_from_images(arguments: argparse.Namespace) -> dict:
    if arguments.images is None:
        raise UserError("MUG repaints and captions pictures: name some with --images")
    for path in arguments.images:
        if not path.exists():
            raise UserError(f"--images: {path} does not exist")
    from megamug.generation import images

    return images.generate_from_images(
        arguments.run_dir, arguments.images, mask_ratio=arguments.mask_ratio, top_p=arguments.top_p,
        temperature=arguments.temperature, output=arguments.output, step=arguments.checkpoint,
    )


def _generate_documents(arguments: argparse.Namespace) -> dict:
    if arguments.prompt is None and arguments.image is None:
        raise UserError("a document is written from its beginning: give it with --prompt, --image or both")
    if arguments.image is not None and not arguments.image.is_file():
        raise UserError(f"--image: {arguments.image} is no file")
    from megamug.generation import documents

    return documents.generate_documents(
        arguments.run_dir, arguments.prompt or [""], image=arguments.image, max_images=arguments.max_images,
        max_tokens=arguments.max_tokens, temperature=arguments.temperature, top_p=arguments.top_p,
        guidance=arguments.guidance, contrastive=arguments.contrastive, contrastive_top_k=arguments.contrastive_top_k,
        samples=arguments.samples or 1, seed=arguments.seed, output=arguments.output, step=arguments.checkpoint,
    )


def _plan(arguments: argparse.Namespace) -> int:
    if arguments.top < 1:
        raise UserError(f"--top is {arguments.top}; it must be at least 1")
    if arguments.json is not None and (arguments.json.is_dir() or not arguments.json.absolute().parent.is_dir()):
        raise UserError(f"--json: {arguments.json} is not a file in a folder that exists")
    from megamug.durable import replace_text
    from megamug.planner import report
    from megamug.planner import search as planner

    config = load_config(arguments.config, arguments.overrides)
    fixed = [override.partition("=")[0].strip() for override in arguments.overrides]
    found = planner.plan(config, arguments.gpus, arguments.gpu, arguments.memory, arguments.vocabulary_size, fixed)
    print(report.text(found, arguments.top))
    if arguments.json is not None:
        replace_text(arguments.json, report.as_json(found))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from megamug import doctor

    return doctor.run(as_json=arguments.json)


def _check_run(arguments: argparse.Namespace) -> None:
    """RUN is a run folder with a checkpoint (that of --checkpoint), and --output can be a folder."""
    run, step = arguments.run_dir, arguments.checkpoint
    if not run.is_dir():
        raise UserError(f"there is no run folder {run} (looked in {Path.cwd()}); give run_dir of the configuration")
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml; give run_dir of the configuration")
    names = [path.name for path in run.glob("checkpoints/step-*") if path.is_dir()]
    steps = sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name))
    if not steps:
        raise UserError(f"{run} has no checkpoint yet; train first: megamug train {run / 'config.yaml'}")
    if step is not None and step not in steps:
        nearest = min(steps, key=lambda there: abs(there - step))
        raise UserError(f"{run} has no checkpoint of step {step}; the nearest is --checkpoint {nearest}")
    if problem := folder_problem(arguments.output or run):
        raise UserError(f"--output: {problem}; name another folder")


def _print_json(figures: dict, asked: bool) -> None:
    """For programs: on a terminal the table or the list on stderr has said it, and a file holds it."""
    if _speaks() and (asked or not sys.stdout.isatty()):
        print(json.dumps(figures, indent=2, default=str))


def _speaks() -> bool:
    """Whether this process prints what all of them know: rank 0."""
    return os.environ.get("RANK", "0") == "0"


def _tell(message: str) -> None:
    """One line on stderr, from the first process of each machine: a path may be missing on one machine alone.

    The launcher ends all processes as soon as one exits, and would cut off the one that speaks. So the others wait to
    be ended, and speak themselves if that does not come: then nobody else has found this mistake.
    """
    rank = os.environ.get("RANK", "0")
    local = os.environ.get("LOCAL_RANK", rank)
    if local.isdecimal() and local != "0":
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            if signal.sigtimedwait({signal.SIGTERM}, PATIENCE_SECONDS) is not None:
                return
        finally:  # whoever called `main` goes on, and what it starts inherits the mask
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr, flush=True)

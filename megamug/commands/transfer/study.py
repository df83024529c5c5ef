"""Ask one question of many trainings: megamug study NAME CONFIG.yaml --data SHARDS --test SHARDS --output STUDY

    weights    what the weights of the two losses are worth (--grid IMAGE:CAPTION ...)
    captions   pixels, captions, both, captions of other images; with --other-data the same of other pairs
    scaling    pixels, captions and both on shares of the data (--fractions)
    custom     variants that --variants FILE.yaml names: `variants: {NAME: [section.key=value, ...]}`

Each variant is trained with every seed as an ordinary run, its encoder measured by a linear probe and k-NN on labelled
images, beside the untrained encoder. STUDY/report.md, .json and .png say what came out. Started again, it goes on;
several jobs may work on one study at once. See docs/transfer.md.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from megamug.command_line import launcher
from megamug.command_line.arguments import COUNT, Parser, Range, device, number, output_folder
from megamug.command_line.console import counted
from megamug.commands.transfer import METHODS
from megamug.configuration import validate
from megamug.configuration.reading import absolute, load_config, resolve
from megamug.configuration.sections import Config
from megamug.data.pairs.images import SHARE
from megamug.errors import UserError
from megamug.transfer.study import questions

FEATURES = ("mean", "class_token")
FAILED, STOPPED = 1, 3  # exit codes
PLOT = "matplotlib"
_OVERRIDE = re.compile(r"\w+\.\w+=")


def main(argv: list[str], prog: str | None = None) -> int:
    options = _parse(argv, prog)
    if launcher.world_size() > 1:
        raise UserError("megamug study is one process, which starts those of a training itself; start it without"
                        ' torchrun, and give it --launcher "torchrun --nproc-per-node N"')  # fmt: skip
    _check_plot(options)
    if options.report:
        return _report(options)
    if missing := [name for name in ("config", "test") if not getattr(options, name)]:
        named = {"config": "CONFIG.yaml", "test": "--test"}
        raise UserError(f"{' and '.join(named[name] for name in missing)} wanted; see `{prog or 'study'} --help`")
    question = _question(options)
    questions.check_overrides(question)
    configs = {v.name: _config(options, v.overrides, run_dir=options.output / "runs" / v.name)
               for v in question.variants}  # fmt: skip
    first = configs[question.variants[0].name]
    _check_kinds(options, question, configs)
    size = _processes(options.launcher)
    for name, config in configs.items():
        _check(name, config, size)

    from megamug.transfer.study import cells, folder

    sets = _sets(options, first)
    measure = folder.Measure(tuple(m for m in ("linear", "knn") if m in options.methods),
                             tuple(options.features), options.k, options.view)  # fmt: skip
    identity = folder.identity(_config(options, ()), sets)
    if options.dry_run:
        return _dry_run(options, question, configs)
    study = folder.begin(options.output, question, options.seeds, measure, identity, first.model.initial is None)
    tools = cells.Tools(
        _paths(options.probe or first.data.train), options.test, shlex.split(options.launcher or ""),
        options.device or cells.devices(), options.keep_features,
    )  # fmt: skip
    return _work(options, study, configs, tools)


def _parse(argv: list[str], prog: str | None) -> Namespace:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("name", metavar="NAME", choices=questions.NAMES, help="weights, captions, scaling or custom")
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, nargs="?", help="of a MUG")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help="win over the file")
    data = parser.add_argument_group("data")
    data.add_argument("--data", nargs="+", metavar="PATH", help="shards to train on (default: data.train of CONFIG)")
    data.add_argument("--probe", nargs="+", metavar="PATH", help="labelled shards that probes learn from (default:"
                      " those that are trained on)")  # fmt: skip
    data.add_argument("--test", nargs="+", metavar="PATH", help="labelled shards that probes are measured on")
    data.add_argument("--other-data", nargs="+", metavar="PATH", help="captions: other pairs to train on, such as the"
                      " same images with other captions")  # fmt: skip
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--output", type=output_folder, required=True, metavar="STUDY")
    asked.add_argument("--seeds", type=COUNT, default=3, metavar="N", help="trainings of each variant, seeds 1 to N"
                       " (default %(default)s); may grow later")  # fmt: skip
    asked.add_argument("--grid", type=_weights, nargs="+", metavar="IMAGE:CAPTION", help="weights: pairs of weights"
                       f" of losses (default: {' '.join(f'{i:g}:{c:g}' for i, c in questions.GRID)})")  # fmt: skip
    asked.add_argument("--fractions", type=number(float, Range(0, 1, open_low=True)), nargs="+", metavar="F",
                       help=f"scaling: shares of the data (default: {' '.join(map(str, questions.FRACTIONS))})")
    asked.add_argument("--variants", type=Path, metavar="FILE.yaml", help="custom: the variants")
    asked.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    asked.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES))
    asked.add_argument("--k", type=COUNT, default=20, help="neighbours of k-NN (default %(default)s)")
    asked.add_argument("--view", type=number(float, Range(0, 1, open_low=True)), default=SHARE, metavar="SHARE",
                       help="of the shorter side that probes see, the centre (default %(default)s)")  # fmt: skip
    work = parser.add_argument_group("how it is done")
    work.add_argument("--launcher", metavar="COMMAND", help='what starts trainings and features, such as "torchrun'
                      ' --nproc-per-node 8"')  # fmt: skip
    work.add_argument("--device", type=device, help="of features and probes (default: a GPU where there is one)")
    work.add_argument("--share", type=_share, default=(1, 1), metavar="I/N", help="the I-th of N parts of the cells,"
                      " for several jobs: 1/N to N/N")  # fmt: skip
    work.add_argument("--keep-features", action="store_true", help="in STUDY/features")
    work.add_argument("--no-plot", action="store_true", help="no report.png, which needs matplotlib")
    work.add_argument("--report", action="store_true", help="only write the report of what is there")
    work.add_argument("--dry-run", action="store_true", help="only list the cells and what they cost")
    work.add_argument("--gpu", choices=("h100", "h200", "a100"), help="with --dry-run: predict times, too")
    work.add_argument("--gpus", type=COUNT, metavar="N", help="of that kind (default: 1)")
    overrides = [word for word in argv if _OVERRIDE.match(word)]  # also behind options that take several words
    options = parser.parse_intermixed_args([word for word in argv if not _OVERRIDE.match(word)])
    options.overrides += overrides
    for option, name in (("grid", "weights"), ("fractions", "scaling"), ("variants", "custom"),
                         ("other_data", "captions")):  # fmt: skip
        if getattr(options, option) is not None and options.name != name:
            raise UserError(f"--{option.replace('_', '-')} is of `study {name}`, not of `study {options.name}`")
    if (options.gpu or options.gpus) and not options.dry_run:
        raise UserError("--gpu and --gpus go with --dry-run")
    return options


def _weights(text: str) -> tuple[float, float]:
    weight = number(float, Range(0))
    image, colon, caption = text.partition(":")
    if not colon:
        raise ArgumentTypeError(f"IMAGE:CAPTION wanted, such as 1:0.1, found {text!r}")
    return weight(image), weight(caption)


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ArgumentTypeError(f"1/N to N/N wanted, found {text!r}")
    return int(match[1]), int(match[2])


def _question(options: Namespace) -> questions.Question:
    if options.name == "weights":
        return questions.weights(options.grid or questions.GRID)
    if options.name == "scaling":
        return questions.scaling(options.fractions or questions.FRACTIONS)
    if options.name == "captions":
        return questions.captions(_as_yaml(options.other_data) if options.other_data else None)
    if options.variants is None:
        raise UserError("study custom: --variants FILE.yaml wanted")
    return questions.custom(options.variants)


def _as_yaml(paths: list[str]) -> str:
    return json.dumps(paths, ensure_ascii=False)


def _config(options: Namespace, overrides: tuple[str, ...], seed: int = 1, run_dir: Path | None = None) -> Config:
    """CONFIG with the overrides of the command line, then those of a variant."""
    data = [f"data.train={_as_yaml(options.data)}"] if options.data else []
    ours = [f"seed={seed}", *([f"run_dir={run_dir.absolute()}"] if run_dir else [])]
    return absolute(load_config(options.config, [*data, *options.overrides, *overrides, *ours]))


def _check_kinds(options: Namespace, question: questions.Question, configs: dict[str, Config]) -> None:
    for name, config in configs.items():
        if config.model.kind != "mug":
            raise UserError(f"variant {name} is of model.kind={config.model.kind}; studies are of encoders of a MUG")
    for key in ("image_loss_weight", "caption_loss_weight") if question.name in ("captions", "scaling") else ():
        if getattr(_config(options, ()).model, key) == 0:
            raise UserError(f"model.{key} is 0 in {options.config}: `study {question.name}` sets it to 0 itself where"
                            " there is to be none; give it the weight that both are trained with")  # fmt: skip


def _processes(command: str | None) -> int | None:
    """How many a launcher starts, where it says so as torchrun does."""
    if command is None:
        return 1
    words = shlex.split(command)
    if not words or shutil.which(words[0]) is None:
        raise UserError(f"--launcher: there is no command {words[0] if words else command!r}")
    found = {}
    for name in ("nproc", "nnodes"):
        match = re.search(rf"--{name}[-_]?(?:per[-_]node)?[= ](\d+)(?= |$)", command)
        found[name] = int(match[1]) if match else None
    return None if found["nproc"] is None else found["nproc"] * (found["nnodes"] or 1)


def _check(name: str, config: Config, size: int | None) -> None:
    try:
        if size is not None:
            return validate.validate(config, size, here=size == 1)
        config = resolve(config)  # of an unknown number of processes: all but the layout
        for check in (validate.model, validate.trackers, validate.files, validate.run_folder, validate.vocabulary):
            check(config)
    except UserError as error:
        raise UserError(f"variant {name}: {error}") from None


def _paths(train: str | list) -> list[str]:
    return [train] if isinstance(train, str) else [train_set["path"] for train_set in train]


def _sets(options: Namespace, config: Config) -> dict[str, list]:
    """The sets behind each option, opened. Raises UserError where they cannot answer the question."""
    from megamug.data.shards.sources import resolve_sources

    named = {"--data": config.data.train, "--probe": options.probe or config.data.train, "--test": options.test,
             "--other-data": options.other_data}  # fmt: skip
    sets = {}
    for option, value in named.items():
        try:
            sets[option] = resolve_sources(value) if value else []
        except UserError as error:
            raise UserError(f"{option}: {error}") from None
    for option in ("--probe", "--test"):
        shards = [shard for source in sets[option] for shard in source.shards]
        labelled = sum(shard.header.labelled for shard in shards)
        if not labelled:
            raise UserError(f"{option}: no image has a label (KEY.cls, or `label` in KEY.json), and probes need some")
        if option == "--probe" and labelled < options.k:
            raise UserError(f"--k is {options.k}, but {option} has {counted(labelled, 'labelled image')}; give fewer")
    tested = {shard.header.shard_sha256: shard.path for source in sets["--test"] for shard in source.shards}
    for option in ("--data", "--probe", "--other-data"):
        for shard in (shard for source in sets[option] for shard in source.shards):
            if shard.header.shard_sha256 in tested:
                raise UserError(f"{option} and --test are of the same images: {shard.path} holds what"
                                f" {tested[shard.header.shard_sha256]} holds; hold some out")  # fmt: skip
    return sets


def _check_plot(options: Namespace) -> None:
    import importlib.util

    if not options.no_plot and not options.dry_run and importlib.util.find_spec(PLOT) is None:
        raise UserError(f"the plot needs {PLOT}, which is not installed here; pip install {PLOT}, or give --no-plot")


def _work(options: Namespace, study, configs: dict[str, Config], tools) -> int:
    from megamug.transfer.study import cells, report

    overrides = {variant.name: variant.overrides for variant in study.question.variants}
    asked = [cell for cell in study.cells() if cell.seed <= options.seeds]
    mine = asked[options.share[0] - 1 :: options.share[1]]
    failed, code = [], 0
    for number_, cell in enumerate(mine, 1):
        head = f"{number_}/{len(mine)} {cell.name}"
        if study.is_done(cell):
            print(f"{head}: done before", file=sys.stderr)
            continue
        print(f"{head}: at work (log: {study.path('logs', cell, '.log')})", file=sys.stderr, flush=True)
        config = _config(options, overrides[cell.variant], cell.seed, study.path("runs", cell))
        outcome, told = cells.run(study, cell, config, tools)
        print(f"{head}: {outcome}: {told}", file=sys.stderr, flush=True)
        if outcome == cells.STOPPED:
            code = STOPPED
            break
        if outcome == cells.FAILED:
            failed.append(cell.name)
    print(report.write(study, not options.no_plot), end="")
    print(f"written: {study.folder}/report.md, .json" + ("" if options.no_plot else ", .png"), file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    return code or (FAILED if failed else 0)


def _report(options: Namespace) -> int:
    from megamug.transfer.study import report
    from megamug.transfer.study.folder import Study

    study = Study(options.output)
    if study.question.name != options.name:
        raise UserError(f"{options.output} holds a study of {study.question.name}, not of {options.name}")
    print(report.write(study, not options.no_plot), end="")
    return 0


def _dry_run(options: Namespace, question: questions.Question, configs: dict[str, Config]) -> int:
    """A line for each variant: FLOPs of a training, and the time that the planner predicts."""
    from megamug.models.tasks import make_task

    total, hours = 0.0, 0.0
    print(f"{counted(len(configs) * options.seeds, 'training')}: {counted(len(configs), 'variant')} x"
          f" {counted(options.seeds, 'seed')}, seeds 1 to {options.seeds}; each then features and probes")  # fmt: skip
    for variant in question.variants:
        config = resolve(configs[variant.name])
        samples = config.train.steps * config.data.global_batch_size
        flops = make_task(config).flops_per_sample * samples
        line = f"  {variant.name:<24}{flops / 1e15:>12.4g} PFLOP"
        if options.gpu:
            seconds = samples / _predicted(config, options)
            line += f"{seconds / 3600:>10.3g} h"
            hours += seconds / 3600 * options.seeds
        total += flops * options.seeds
        print(f"{line}   {' '.join(variant.overrides)}")
    said = f"  {'all':<24}{total / 1e15:>12.4g} PFLOP"
    gpus = f"   on {counted(options.gpus or 1, 'GPU')}, as `megamug plan` predicts" if options.gpu else ""
    print(said + (f"{hours:>10.3g} h" if options.gpu else "") + gpus)
    return 0


def _predicted(config: Config, options: Namespace) -> float:
    """Samples a second of the configuration's own layout."""
    from megamug.planner import search

    fixed = ("parallel.tensor", "parallel.pipeline", "parallel.virtual", "parallel.sequence", "parallel.recompute",
             "parallel.distributed_optimizer", "data.micro_batch_size", "precision.fp8")  # fmt: skip
    return search.plan(config, options.gpus or 1, options.gpu, fixed=fixed).choices[0].samples_per_second

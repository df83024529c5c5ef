"""Top-1, top-5 and losses against figures by hand, each held-out image once; data of other classes are refused."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from megamug import cli, evaluate
from megamug.errors import UserError
from megamug.evaluate.classification import check_classes
from megamug.generation.loading import load_run
from megamug.models.classifier.model import ClassBatch
from tests.training.classified import NAMES, make_shards, options

HELD_OUT = 10  # three micro-batches of four, the last of which is half padding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classification")
    make_shards(folder, {"train": 9, "heldout": HELD_OUT})
    config = options(folder, folder / "run", train={"steps": 3}, data={"validation_samples": 4})
    config["classifier"] = {"classes": 7, "label_smoothing": 0.2}  # four of which have no name and no image
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["train", str(folder / "run.yaml")]) == 0
    return folder


def test_figures_are_those_by_hand(folder, capsys):
    assert cli.main(["evaluate", str(folder / "run"), "--task", "classification", "--json"]) == 0
    shown = capsys.readouterr()
    figures = json.loads(shown.out)
    assert (folder / "run" / "classes.txt").read_text() == "".join(f"{name}\n" for name in NAMES)
    results = [json.loads(line) for line in open(figures["results"], encoding="utf-8")]
    assert len({one["key"] for one in results}) == len(results) == figures["samples"] == HELD_OUT
    losses, right, among, per_class = [], [], [], {number: [] for number in range(3)}
    with load_run(folder / "run") as run:
        loader = run.task.loader(run.world, train=False)
        for micro in (micro for pairs in loader for micro in pairs.micro_batches):
            for row, counts in enumerate(micro.valid):
                if not counts:
                    continue
                label = int(micro.keys()[row].removeprefix("0.tar: ")) % 3
                image = micro.images[row : row + 1]
                chances = run.model.logits(ClassBatch(image, torch.tensor([label])))[0].double().softmax(0)
                order = sorted(range(7), key=lambda c: -float(chances[c]))
                losses.append(-float(chances[label].log()))
                right.append(order[0] == label)
                among.append(label in order[:5])
                per_class[label].append(order[0] == label)
        loader.close()
    assert figures["loss"] == pytest.approx(sum(losses) / HELD_OUT, rel=1e-5)
    assert figures["top1"] == sum(right) / HELD_OUT and figures["top5"] == sum(among) / HELD_OUT
    assert [(one["class"], one["name"], one["samples"], one["top1"]) for one in figures["per_class"]] == [
        (number, NAMES[number], len(own), sum(own) / len(own)) for number, own in per_class.items()
    ]
    means = [sum(own) / len(own) for own in per_class.values()]
    assert figures["mean_per_class"] == pytest.approx(sum(means) / 3)
    assert f"top-1               {figures['top1']:>10.2%}" in shown.err and "every sample:" in shown.err


def test_so_many_samples_and_other_data(folder, tmp_path):
    figures = evaluate.run_task(folder / "run", "classification", samples=5, output=tmp_path)
    assert figures["samples"] == 5
    make_shards(tmp_path, {"more": 4})
    figures = evaluate.run_task(folder / "run", "classification", data=str(tmp_path / "more"), output=tmp_path)
    assert figures["samples"] == 4


def test_data_of_other_classes_are_refused(folder, tmp_path, capsys):
    make_shards(tmp_path, {"turned": 4}, names=NAMES[::-1])
    with pytest.raises(UserError, match="classes.txt is another than that of"):
        evaluate.run_task(folder / "run", "classification", data=str(tmp_path / "turned"), output=tmp_path)
    from megamug.data.shards.sources import resolve_sources

    with pytest.raises(UserError, match="3 classes, and nowhere was trained on 2"):
        check_classes(2, resolve_sources(str(tmp_path / "turned")), "nowhere")
    turned = [f"data.train={tmp_path / 'turned'}", "data.validation=null", "train.steps=4"]
    assert cli.main(["train", str(folder / "run.yaml"), *turned]) == 2
    assert "holds a run on other classes" in capsys.readouterr().err
    with pytest.raises(UserError, match="whose tasks are: classification"):
        evaluate.run_task(folder / "run", "reconstruction")
    assert cli.main(["generate", str(folder / "run"), "--prompt", "a"]) == 2
    assert "--task classification" in capsys.readouterr().err

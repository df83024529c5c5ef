"""`megamug convert` and `megamug inspect` as they are called; mistakes end in a sentence."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

from megamug.checkpoint.tensors import LazyTensor, TensorReader, write_run
from megamug.commands import convert as convert_command
from megamug.commands import inspect as inspect_command
from megamug.configuration.reading import load_config, resolve
from megamug.convert.conversion import from_megamug
from megamug.convert.registry import FORMATS
from megamug.convert.source import ForeignTensors
from megamug.errors import UserError
from megamug.models.blocks.positions import sincos_positions
from tests.convert.common import assert_same_bits, tensors_in

convert, inspect = convert_command.main, inspect_command.main


def mae(layers: int = 2, width: int = 16) -> dict[str, torch.Tensor]:
    """MAE's encoder: a patch of 4 x 4 pixels, 16 patches."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"cls_token": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 4, 4), "patch_embed.proj.bias": (width,)}
    for i in range(layers):
        for name, shape in {
            "norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": (width,),
            "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width),
        }.items():  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return state | {"pos_embed": sincos_positions(width, 4, 4, 1)[None]}


@pytest.fixture
def source(tmp_path) -> Path:
    torch.save({"model": mae()}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth"


def to_run(source: Path, run: Path, *more: str) -> None:
    convert(["--from", "mae", "--to", "megamug", str(source), str(run), "--config", "model.heads=4", *more])


def test_there_and_back_and_what_is_told(source, tmp_path, capsys):
    to_run(source, tmp_path / "run", "seed=7")
    assert load_config(tmp_path / "run" / "config.yaml").seed == 7
    paths = [str(tmp_path / "run"), str(tmp_path / "out")]
    convert([*paths, "--from", "megamug", "--to", "mae", "--max-shard-size", "5KB"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in mae().values())
    assert_same_bits(tensors_in(tmp_path / "out"), mae())
    assert set(ForeignTensors(tmp_path / "out").names) == set(mae())
    assert "written: " in capsys.readouterr().out
    convert(["--from", "megamug", "--to", "megamug", str(tmp_path / "run"), str(tmp_path / "copy")])
    one, two = TensorReader(tmp_path / "run"), TensorReader(tmp_path / "copy")
    assert_same_bits({n: one.read(n) for n in one.names}, {n: two.read(n) for n in two.names})


def test_weights_that_lie_under_another_key(tmp_path):
    for key in ("state_dict", "ema"):
        torch.save({key: mae(), "steps": 3}, tmp_path / f"{key}.pt")
        assert set(ForeignTensors(tmp_path / f"{key}.pt").names) == set(mae())


@pytest.mark.parametrize("form, key, value, said", [
    ("hf_llama", "hidden_size", "many", "says hidden_size 'many' where a whole number above 0 belongs"),
    ("hf_llama", "num_attention_heads", 0, "says num_attention_heads 0 where"),
    ("hf_llama", "rope_parameters", [1], "is not what the library writes"),
    ("hf_vit", "patch_size", -4, "no whole number above 0 for patch_size"),
    ("hf_vit", "layer_norm_eps", "small", "is not what the library writes"),
])  # fmt: skip
def test_sizes_of_another_type_in_config_json(tmp_path, form, key, value, said):
    sizes = dict.fromkeys(("hidden_size", "num_attention_heads", "intermediate_size"), 4) | {"num_hidden_layers": 1}
    sizes |= {
        "hf_llama": {"model_type": "llama", "max_position_embeddings": 16, "vocab_size": 4},
        "hf_vit": {"model_type": "vit", "patch_size": 4, "image_size": 8},
    }[form] | {key: value}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    save_file({"model.embed_tokens.weight": torch.ones(4, 4), "layers.0.x": torch.ones(1)},
              tmp_path / "model" / "model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match=f"{tmp_path / 'model'}: its config.json .*{said}"):
        convert(["--from", form, "--to", "megamug", str(tmp_path / "model"), str(tmp_path / "run")])


def test_files_that_are_none_of_tensors(source, tmp_path):
    (tmp_path / "noise.pth").write_bytes(bytes(range(223, 255)) * 20)
    with pytest.raises(UserError, match="noise.pth is damaged, or no file of tensors"):
        inspect([str(tmp_path / "noise.pth")])
    to_run(source, tmp_path / "run")
    with pytest.raises(UserError, match="is a run folder of megamug, not another library's; say --from megamug"):
        to_run(tmp_path / "run", tmp_path / "again")
    with pytest.raises(UserError, match="mae.pth: no image tokenizer in there"):
        convert(["--from", "vq_taming", "--to", "megamug", str(source), str(tmp_path / "vq"), "--config",
                 "image_size=32"])  # fmt: skip


def test_unknown_and_missing_keys_are_listed_and_fatal(tmp_path):
    state = mae() | {"head.weight": torch.ones(2, 16), "head.bias": torch.ones(2)}
    del state["norm.bias"]
    save_file(state, tmp_path / "mae.safetensors")
    with pytest.raises(UserError, match="1 missing keys: norm.bias; 2 unknown keys: head.bias, head.weight"):
        to_run(tmp_path / "mae.safetensors", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="1 missing keys: norm.bias; name"):
        to_run(tmp_path / "mae.safetensors", tmp_path / "run", "--allow-missing", "head.*")
    to_run(tmp_path / "mae.safetensors", tmp_path / "run", "--allow-missing", "head.*", "norm.bias")
    assert not TensorReader(tmp_path / "run").read("encoder.stack.final_layernorm.bias").any()  # drawn: zeros


def test_learned_positions_are_refused_unless_allowed(tmp_path, capsys):
    state = mae()
    state["pos_embed"] = state["pos_embed"] + 0.02 * torch.randn(state["pos_embed"].shape)
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match="pos_embed differs by up to .* it was learned.*--allow-missing pos_embed"):
        to_run(tmp_path / "vit.safetensors", tmp_path / "run")
    to_run(tmp_path / "vit.safetensors", tmp_path / "run", "--allow-missing", "pos_embed")
    assert "outputs differ from the source's" in capsys.readouterr().out


def test_decoders_for_training_on_are_drawn_when_asked_for(source, tmp_path):
    """An encoder of MAE in a MUG that will paint: what the source has not is as a new run would draw it."""
    from megamug.generation.loading import load_run
    from megamug.models.init import draw

    options = ["model.image_loss_weight=1", "model.decoder_layers=1", "model.decoder_width=8", "model.decoder_heads=2"]
    with pytest.raises(UserError, match="missing keys: .*decoder_blocks.0.attn.qkv.weight"):
        to_run(source, tmp_path / "run", *options)
    to_run(source, tmp_path / "run", *options, "--allow-missing", "decoder_*", "mask_token")
    name = "image_decoder.stack.layers.0.mlp.linear_fc2.weight"
    assert torch.equal(TensorReader(tmp_path / "run").read(name), draw(name, (8, 32), 1234))
    with load_run(tmp_path / "run") as run:
        assert run.model.image_decoder is not None
    # and for a format that has no image decoder at all
    save_file(mae(), tmp_path / "vit.safetensors")
    convert(["--from", "timm", "--to", "megamug", str(tmp_path / "vit.safetensors"), str(tmp_path / "timm"),
             "--config", "model.heads=4", *options, "--allow-missing", "image_decoder.*"])  # fmt: skip
    assert set(TensorReader(tmp_path / "timm").names) == set(TensorReader(tmp_path / "run").names)


def test_a_hostile_pickle_does_nothing(tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    for number, zipped in enumerate((True, False)):
        path = tmp_path / f"hostile{number}.pth"
        torch.save({"model": mae(), "args": Hostile()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="posix.mkdir.*It was not run"):
            to_run(path, tmp_path / "run")
        assert not canary.exists()
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"model": Hostile()}))
    with pytest.raises(UserError):
        to_run(tmp_path / "plain.pkl", tmp_path / "run")
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # it would have


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_truncated_files_say_so(tmp_path, kind):
    path = tmp_path / f"mae.{kind}"
    save_file(mae(), path) if kind == "safetensors" else torch.save({"model": mae()}, path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated or damaged; copy it again"):
            to_run(path, tmp_path / "run")
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        to_run(path, tmp_path / "run")


def test_a_missing_shard_says_so(source, tmp_path):
    to_run(source, tmp_path / "run")
    from_megamug(FORMATS["mae"], tmp_path / "run", tmp_path / "out", max_shard_bytes=5000)
    next((tmp_path / "out").glob("*-00002-*")).unlink()
    with pytest.raises(UserError, match="model-00002-of-.* is missing; copy it again"):
        ForeignTensors(tmp_path / "out")
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": "../../secret.safetensors"}}))
    with pytest.raises(UserError, match="points outside its folder"):
        ForeignTensors(tmp_path / "out")


def test_outputs_are_never_overwritten(source, tmp_path):
    to_run(source, tmp_path / "run")
    with pytest.raises(UserError, match="holds a run already"):
        to_run(source, tmp_path / "run")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists; choose another folder"):
        convert(["--from", "megamug", "--to", "mae", str(tmp_path / "run"), str(tmp_path / "out")])


@pytest.mark.parametrize("arguments, message", [
    (["--from", "mea", "--to", "megamug"], "nearest is 'mae'"),
    (["--from", "mae", "--to", "timm"], "convert to megamug first"),
    (["--from", "megamug", "--to", "mae", "--config", "seed=1"], "leave it out"),
    (["--from", "megamug", "--to", "mae", "--max-shard-size", "5 GiB"], "a size such as 5GB"),
    (["--from", "megamug", "--to", "mae"], "neither a run folder"),
    (["--from", "megamug", "--to", "hf_vit", "--pth"], "--pth is how MAE's scripts read models"),
    (["--from", "mae", "--to", "megamug", "--pth"], "--pth is how MAE's scripts read models"),
    (["--from", "llamagen_gpt", "--to", "megamug"], "holds no matrix tok_embeddings.weight"),
])  # fmt: skip
def test_mistakes_end_in_a_sentence(source, tmp_path, arguments, message):
    paths = [str(source), str(tmp_path / "out")]
    with pytest.raises(UserError, match=message):
        convert([*paths, *arguments])


def test_one_parameter_in_memory_in_both_directions(source, tmp_path, monkeypatch):
    """When a tensor is read, none that was read before is alive any more."""
    read: list[StorageWeakRef] = []

    def watched(original):
        def wrapper(self, name):
            assert all(storage.expired() for storage in read), name
            tensor = original(self, name).clone()
            read.append(StorageWeakRef(tensor.untyped_storage()))
            return tensor

        return wrapper

    save_file(mae(), tmp_path / "mae.safetensors")
    monkeypatch.setattr(ForeignTensors, "read", watched(ForeignTensors.read))
    to_run(tmp_path / "mae.safetensors", tmp_path / "run")
    assert len(read) == len(mae())
    read.clear()
    monkeypatch.setattr(TensorReader, "read", watched(TensorReader.read))
    convert(["--from", "megamug", "--to", "mae", str(tmp_path / "run"), str(tmp_path / "out")])
    assert len(read) == len(mae()) - 1  # positions are made


@pytest.mark.parametrize("layout", ["taming", "llamagen"])
def test_image_tokenizers(tmp_path, layout, capsys):
    from megamug.models.image_tokenizer.model import ImageTokenizer, ImageTokenizerConfig

    torch.manual_seed(0)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(
        image_size=16, channels=32, channel_multipliers=(1, 2), residual_blocks=1, attention_resolutions=(8,),
        latent_channels=8, code_width=4, codes=16, normalise_codes=layout == "llamagen",
    ))  # fmt: skip
    tokenizer.save(tmp_path / "vq")
    convert(["--from", "megamug", "--to", f"vq_{layout}", str(tmp_path / "vq"), str(tmp_path / "out")])
    back = ["--from", f"vq_{layout}", "--to", "megamug", str(tmp_path / "out"), str(tmp_path / "again")]
    with pytest.raises(UserError, match="--config image_size=PIXELS"):
        convert(back)
    with pytest.raises(UserError, match="image_size=PIXELS, normalise_codes"):
        convert([*back, "--config", "image_sise=16"])
    convert([*back, "--config", "image_size=16"])
    assert "16 codes, 8 x 8 of an image" in capsys.readouterr().out
    again = ImageTokenizer.load(tmp_path / "again")
    assert again.config == tokenizer.config
    found, expected = dict(again.state_dict()), dict(tokenizer.state_dict())
    if layout == "llamagen":  # normalised codes are written as unit vectors
        codes = torch.nn.functional.normalize(expected.pop("quantize.embedding.weight"), dim=-1)
        torch.testing.assert_close(found.pop("quantize.embedding.weight"), codes)
    assert_same_bits(found, expected)
    other = {"taming": "llamagen", "llamagen": "taming"}[layout]
    with pytest.raises(UserError, match=f"is laid out as {layout}, not {other}"):
        convert(["--from", f"vq_{other}", "--to", "megamug", str(tmp_path / "out"), str(tmp_path / "x"),
                 "--config", "image_size=16"])  # fmt: skip


HOSTILE = "a\x1b]0;pwned\x07\x1b[2J\nwritten: run\u202e"


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_names_in_a_file_do_not_reach_the_terminal_as_they_are(tmp_path, capsys, kind):
    """An escape sequence in a name of a tensor, of a class or of a key of config.json writes on the screen."""
    path = tmp_path / f"x.{kind}"
    state = mae() | {HOSTILE: torch.ones(2)}
    save_file(state, path) if kind == "safetensors" else torch.save({"model": state, HOSTILE: 1}, path)
    with pytest.raises(UserError, match="unknown keys: a") as caught:
        to_run(path, tmp_path / "run")
    assert str(caught.value).isprintable() and r"\x1b]0;pwned\x07\x1b[2J\nwritten: run\u202e" in str(caught.value)
    to_run(path, tmp_path / "run", "--allow-missing", "a*")
    inspect([str(path), "--tensors", "--norms"])
    inspect([str(path), "--json"])
    out = capsys.readouterr().out
    assert "pwned" in out and all(line.isprintable() for line in out.split("\n")), out
    (tmp_path / "config.json").write_text(json.dumps({"model_type": HOSTILE, HOSTILE: 1}))
    for config in ({"model_type": HOSTILE}, {"model_type": "llama", HOSTILE: HOSTILE}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        inspect([str(path)])
        with pytest.raises(UserError, match="pwned") as caught:
            convert(["--from", "hf_llama", "--to", "megamug", str(path), str(tmp_path / "again")])
        assert str(caught.value).isprintable()
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))


def test_inspection(source, tmp_path, capsys):
    to_run(source, tmp_path / "run")
    capsys.readouterr()
    assert inspect([str(tmp_path / "run"), "--norms", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["complete"] and report["step"] == 0 and report["model"] == "mug"
    assert report["origin"]["format"] == "mae" and report["optimizer"] == []
    entry = report["tensors"]["encoder.cls_token"]
    assert entry["shape"] == [1, 16] and entry["dtype"] == "float32" and entry["finite"]
    assert entry["norm"] == pytest.approx(float(mae()["cls_token"].norm()))
    assert inspect([str(tmp_path / "run" / "checkpoints" / "step-00000000"), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "complete checkpoint of step 0" in text and "converted from mae" in text
    assert "encoder.cls_token  [1, 16]  float32" in text and f"{len(report['tensors'])} tensors" in text
    assert inspect([str(source)]) == 0
    assert "tensors of another library" in capsys.readouterr().out


def test_inspection_of_a_trained_checkpoint(tmp_path, capsys):
    """Cursor, layout and optimizer state as a run on several processes leaves them."""
    config = resolve(load_config(None, ["parallel.tensor=8"]))  # of the next start: the checkpoint knows its own
    layout = {"tensor": 2, "pipeline": 2, "virtual": 1, "data": 1, "sequence": False, "distributed_optimizer": True}
    tensors = {"encoder.x": torch.ones(3), "optimizer.exp_avg.encoder.x": torch.ones(3)}
    path = write_run(tmp_path / "run", config, [
        LazyTensor(name, (3,), torch.float32, lambda name=name: tensors[name]) for name in tensors
    ])  # fmt: skip
    state = json.loads((path / "state.json").read_text()) | {"layout": layout}
    state["cursor"] = {"samples": 4096, "seed": 1, "fingerprint": "x"}
    (path / "state.json").write_text(json.dumps(state))
    assert inspect([str(tmp_path / "run")]) == 1  # damaged: the manifest knows another state.json
    out = capsys.readouterr().out
    assert "no complete checkpoint" in out and "step-00000000: state.json: " in out
    from tests.checkpoint.test_tensors import remanifest

    remanifest(path)
    assert inspect([str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "4,096 samples seen" in out and "optimizer state: exp_avg" in out
    assert "tensor 2, pipeline 2, virtual 1, data 1, sequence False, distributed_optimizer True" in out
    (path / "state.json").write_text(json.dumps({key: state[key] for key in state if key != "layout"}))  # an older one
    remanifest(path)
    assert inspect([str(tmp_path / "run")]) == 0
    assert "layout: not recorded; optimizer state" in capsys.readouterr().out
    with pytest.raises(UserError, match="no checkpoint yet"):
        (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
        inspect([str(tmp_path / "empty")])

